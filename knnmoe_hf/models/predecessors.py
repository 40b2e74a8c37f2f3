"""Which token each new token of a forward goes on from, read from the arguments of the decoder.

Tokens lie in slots: those of a row that are in the cache have the slots 0 to past - 1, and the S new ones follow. The
predecessor of a token is the last slot before its own that it attends to, so that its running means are over its own
past alone: in packed rows, in trees of continuations that share a prefix, and with padding on any side.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from knnmoe_hf.lookup.sequence import Links

_FORBIDDEN = -9e3  # in additive masks: -1e4 is -9984 after bfloat16; biases of single positions are far smaller
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
_LARGEST = 2**26  # elements of a mask that are looked through at once
_MASKS_WITHOUT_POSITIONS = ("gpt_oss",)  # model types that do not tell their masks where packed sequences begin


def named_arguments(args: tuple, kwargs: dict) -> dict:
    """The arguments of a decoder's forward by name; the positional ones are named in the order of the signature."""
    return dict(zip(_POSITIONAL, args)) | kwargs


def shape_of(call: dict) -> tuple[int, int]:
    """(B, S): number of rows, and of new tokens in each row."""
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    return tokens.shape[0], tokens.shape[1]


def is_paged(call: dict) -> bool:
    """Whether this is a forward of continuous batching, on a paged cache."""
    return call.get("write_index") is not None


def cached_length(cache: Cache | None) -> int | Tensor:
    """Number of slots that a cache has filled; a tensor () where fetching the number from a device would take time."""
    past = 0 if cache is None else cache.get_seq_length()
    if not isinstance(past, Tensor):
        return past
    if past.device.type == "cpu" and not torch.compiler.is_compiling():
        return int(past)
    return past.clone()  # a static cache counts in place


class Sources(NamedTuple):
    """
    Where each token's past is.

    Attributes:
        links: which of them go on from others of the same call.
        entry: (B,) int64, the slot that each row's first token goes on from, -1 for none; None for the last one.
        slots: (B, S) int64, the slot that each token goes on from, -1 for none; None where `entry` is enough.
    """

    links: Links
    entry: Tensor | None = None
    slots: Tensor | None = None


class CallLayout:
    """
    What the arguments of a forward say of its tokens, read before the forward changes the cache.

    Args:
        call: the arguments by name.
        decoder: the module whose forward this is.

    Attributes:
        rows, length: B and S.
        past: filled slots of the cache, see `cached_length`.
        real: (B * S,) bool, False for padding; None if all new tokens are real.
    """

    def __init__(self, call: dict, decoder: nn.Module):
        self.rows, self.length = shape_of(call)
        cache = None if is_paged(call) else call.get("past_key_values")
        self.past = cached_length(cache)
        self._mask = None if is_paged(call) else _mask_of(call, self.rows, self.length)
        self._positions = _text_positions(call.get("position_ids"))
        self._bounds = call.get("cu_seq_lens_q")
        self._isolates = cache is None and call.get("attention_mask") is None and _isolates_jumps(call, decoder)
        self._first_column = 0 if self._mask is None else _first_column(self._mask, self.length, cache)
        self.real = self._real_tokens()

    def _real_tokens(self) -> Tensor | None:
        """
        Which new tokens are not padding.

        transformers passes a decoder one of: a (B, L) mask over cached and new tokens, a (B, 1, S, L) mask (boolean or
        additive), or a dict of such masks by attention type. In a 4-D mask the real tokens are those that attend to
        themselves; an additive mask forbids that by about -1e4 or less.
        """
        mask = self._mask
        if mask is None:
            return None
        step = torch.arange(self.length, device=mask.device)
        if mask.dim() == 2:
            if isinstance(self.past, Tensor):  # of a static cache: indexing by it needs no device synchronisation
                end = (self.past.to(mask.device) + self.length).clamp_max(mask.shape[1])
                new = mask[:, end - self.length + step]
            else:
                new = mask[:, : self.past + self.length][:, -self.length :]
            return new.reshape(-1).bool()
        rows = mask.expand(self.rows, -1, -1, -1)
        return _allowed(rows[:, :, step, self._columns(mask.device)], heads_at=1).reshape(-1)

    def _columns(self, device: torch.device) -> Tensor:
        """(S,) the columns of the new tokens in a 4-D mask."""
        past = self.past.to(device) if isinstance(self.past, Tensor) else self.past
        return torch.arange(self.length, device=device) + past - self._first_column

    def sources(self) -> Sources:
        """Where each token's past is."""
        if self._mask is not None and self._mask.dim() == 4:
            return self._by_attention()
        return Sources(Links(restarts=self._restarts()), entry=self._entry())

    def _restarts(self) -> Tensor | None:
        """
        Which new tokens begin a sequence without a 4-D mask: (B, S) or (1, S) bool, None if no argument shows it.

        Real tokens at position 0, and those at the bounds of `cu_seq_lens_q`. A jump of the positions begins one only
        where transformers hides what is before it: in a forward without a cache and without a mask.
        """
        starts, positions = None, self._positions
        if positions is not None:
            starts = positions == 0
            if self._isolates:
                starts = starts | (positions != torch.roll(positions, 1, dims=1) + 1)
            if self.real is not None:
                starts = starts & self.real.view(self.rows, self.length).to(positions.device)
        if self._bounds is not None:
            total = self.rows * self.length
            flags = torch.zeros(total + 1, dtype=torch.bool, device=self._bounds.device)
            packed = flags.index_fill(0, self._bounds[1:].long(), True)[:total].view(self.rows, self.length)
            starts = packed if starts is None else starts | packed.to(starts.device)
        return starts

    def _entry(self) -> Tensor | None:
        """The last real slot of each row's past, where a 2-D mask tells it; it may exclude slots that were real."""
        mask = self._mask
        if mask is None or mask.shape[1] <= self.length:  # hybrid models get one over the new tokens alone
            return None
        if isinstance(self.past, Tensor):
            known = mask.bool() & (torch.arange(mask.shape[1], device=mask.device) < self.past.to(mask.device))
        elif self.past == 0 or mask.shape[1] < self.past + self.length:
            return None
        elif mask.device.type == "cpu" and not torch.compiler.is_compiling() and mask[:, self.past - 1].all():
            return None  # found at less cost where the answer need not be fetched from a device
        else:
            known = mask[:, : self.past].bool()
        return _last_true(known)

    def _by_attention(self) -> Sources:
        """Where each token's past is, by a 4-D mask."""
        device = self._mask.device
        columns = self._columns(device)
        step = max(1, _LARGEST // (self._mask.shape[0] * self._mask.shape[1] * self._mask.shape[3]))
        if torch.compiler.is_compiling() or step >= self.length:
            last = self._last_attended(self._mask, columns)
        else:
            parts = zip(self._mask.split(step, dim=2), columns.split(step))
            last = torch.cat([self._last_attended(*part) for part in parts], dim=1)
        slots = torch.where(last < 0, -1, last + self._first_column).expand(self.rows, -1)
        own = columns + self._first_column
        # padding hands on what is before it, for a call in which no mask tells where it is
        slots = torch.where(self.real.view(self.rows, self.length), slots, own - 1)
        return self._as_links(slots, own)

    def _last_attended(self, mask: Tensor, columns: Tensor) -> Tensor:
        """(B or 1, S): the last column before its own that each token may attend to; -1 if there is none."""
        before = torch.arange(mask.shape[3], device=mask.device) < columns[:, None]
        return _last_true(_allowed(mask, heads_at=1) & before)

    def _as_links(self, slots: Tensor, own: Tensor) -> Sources:
        if self.length == 1:
            return Sources(Links(), entry=slots[:, 0])
        # computed without a branch where the answer would have to be fetched from a device
        if slots.device.type == "cpu" and not torch.compiler.is_compiling():
            begins = slots < 0
            if bool((begins | (slots == own - 1))[:, 1:].all()):
                return Sources(Links(restarts=begins), entry=slots[:, 0])
        new = slots - (own - torch.arange(self.length, device=slots.device))  # places among the new tokens
        place = torch.arange(self.length, device=slots.device)
        return Sources(Links(before=torch.where((slots >= 0) & (new >= 0), new, place)), slots=slots)


def _mask_of(call: dict, rows: int, length: int) -> Tensor | None:
    mask = call.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, BlockMask):
        shape = (mask.shape[0], mask.shape[1], *mask.seq_lengths)
        mask = create_mask(mask.mask_mod, *shape, device=mask.kv_num_blocks.device)
    return mask if isinstance(mask, Tensor) and mask.dim() in (2, 4) else None


def _text_positions(positions: Tensor | None) -> Tensor | None:
    """(B or 1, S). Of positions in several dimensions (text, then time, height and width), those in the text."""
    if positions is None or positions.dim() == 2:
        return positions
    if positions.dim() == 1:
        return positions[None]
    return positions[0] if len(positions) == 4 else None


def _isolates_jumps(call: dict, decoder: nn.Module) -> bool:
    """Whether, given neither a mask nor a cache, a decoder hides from each other what a jump of positions divides."""
    config = getattr(decoder, "config", None)
    use_cache = call.get("use_cache")
    if use_cache is None:
        use_cache = getattr(config, "use_cache", None)
    if use_cache and not (getattr(decoder, "gradient_checkpointing", False) and decoder.training):
        return False  # it makes a cache, and with one it hides nothing
    attention = getattr(config, "_attn_implementation", None) or ""
    known = attention in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping and "flash" not in attention
    return known and getattr(config, "model_type", None) not in _MASKS_WITHOUT_POSITIONS


def _first_column(mask: Tensor, length: int, cache: Cache | None) -> int:
    """Slot of a 4-D mask's first column; above 0 for a sliding window that has moved on."""
    layers = cache.layers if cache is not None else []
    sizes = [layer.get_mask_sizes(length) for layer in layers if isinstance(layer, CacheLayerMixin)]
    return next((offset for columns, offset in sizes if columns == mask.shape[-1]), 0)


def _allowed(mask: Tensor, heads_at: int) -> Tensor:
    """Where a part of a 4-D mask lets any head attend, bool without the dimension of the heads."""
    return (mask if mask.dtype == torch.bool else mask > _FORBIDDEN).any(heads_at)


def _last_true(flags: Tensor) -> Tensor:
    """Index of the last True along the last dimension (not empty); -1 where there is none."""
    found = flags.shape[-1] - 1 - flags.flip(-1).view(torch.uint8).argmax(-1)
    return torch.where(flags.any(-1), found, -1)
