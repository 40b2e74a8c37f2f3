"""Reads from the arguments of a decoder's forward what is known of its tokens, and keeps what the next one needs."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from knnmoe_hf.lookup.sequence import SequenceState, Tokens
from knnmoe_hf.models.continuous_batching import PagedState, keep_paged
from knnmoe_hf.models.kv_state import CacheState, StateOwner, keep_sums

_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values")


def named_arguments(args: tuple, kwargs: dict) -> dict:
    """A decoder's arguments by name."""
    return dict(zip(_POSITIONAL, args)) | kwargs


def shape_of(call: dict) -> tuple[int, int]:
    """Rows and new tokens of each, (B, S)."""
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    return tokens.shape[0], tokens.shape[1]


class CallTokens(Tokens):
    """
    The tokens of a decoder's forward.

    Args:
        call: its arguments by name.
        owner: of the routes in force, which own what is kept of these tokens.
    """

    def __init__(self, call: dict, owner: StateOwner):
        super().__init__(*shape_of(call), real=real_tokens(call), state=_state_before(call, owner))
        self.owner = owner
        self._call = {name: call.get(name) for name in ("position_ids", "cu_seq_lens_q")}

    def restarts(self) -> Tensor | None:
        return sequence_starts(**self._call, shape=self.shape, real=self.real)  # nobody asks twice, most never


def _state_before(call: dict, owner: StateOwner) -> SequenceState | None:
    if _is_paged(call):
        return PagedState(call, owner)
    cache = call.get("past_key_values")
    return None if cache is None else CacheState(cache, owner, shape_of(call)[1])


def _is_paged(call: dict) -> bool:
    return call.get("write_index") is not None


def keep_state(call: dict, output, tokens: CallTokens | None) -> None:
    """
    Leaves in the cache of a decoder's forward what its sequences need to go on.

    Args:
        call: the forward's arguments by name.
        output: what it returned.
        tokens: its tokens; None if no routes were in force.
    """
    if _is_paged(call):
        return keep_paged(call, tokens)
    cache = call.get("past_key_values")
    if cache is None:  # the decoder may have made one
        parts = output if isinstance(output, tuple) else output.values()
        cache = next((part for part in parts if isinstance(part, Cache)), None)
    if cache is not None:
        keep_sums(cache, tokens, None if tokens is None else tokens.owner)


def real_tokens(call: dict) -> Tensor | None:
    """
    Which tokens of a decoder's forward are real, by its attention mask alone: (B * S,) bool, or None if all are.

    Reads the forms that transformers passes to a decoder: a (B, L) mask over cache and new tokens, a (B, 1, S, L) mask
    (boolean or additive), or a dict of such masks by attention type. In a 4-D mask a real token sees itself. Packed
    rows and continuous batches, whose masks are laid out by sequence, hold real tokens only.
    """
    mask = call.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or call.get("cu_seq_lens_q") is not None:
        return None
    (rows, length), cache = shape_of(call), call.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    step = torch.arange(length, device=mask.device)
    if mask.dim() == 2:
        if isinstance(past, Tensor):  # without waiting for its value
            new = mask[:, (past + length).clamp_max(mask.shape[1]) - length + step]
        else:
            new = mask[:, : past + length][:, -length:]
        return new.reshape(-1).bool()
    column = step + past - _first_column(mask, length, cache)
    itself = mask[:, 0].expand(rows, -1, -1)[:, step, column]  # (B, S)
    return (itself if itself.dtype == torch.bool else itself == 0).reshape(-1)


def _first_column(mask: Tensor, length: int, cache) -> int:
    """Position of the token in the first column of a 4-D mask: a sliding window's mask begins with its window."""
    layers = cache.layers if cache is not None else []
    sizes = [layer.get_mask_sizes(length) for layer in layers if isinstance(layer, CacheLayerMixin)]
    return next((offset for columns, offset in sizes if columns == mask.shape[-1]), 0)


def sequence_starts(
    position_ids: Tensor | None, cu_seq_lens_q: Tensor | None, shape: tuple[int, int], real: Tensor | None
) -> Tensor | None:
    """
    With which tokens of a decoder's forward another sequence begins: (B, S) or (1, S) bool, or None if nothing says.

    A real token begins one if its position goes on neither from the real token before it nor from its neighbour; the
    first of a row, if its position is 0. `cu_seq_lens_q` says it of packed rows and continuous batches.
    """
    starts = None
    if position_ids is not None and position_ids.dim() == 2:
        starts = _by_position(position_ids, None if real is None else real.view(shape))
    if cu_seq_lens_q is not None:
        total = shape[0] * shape[1]
        flags = torch.zeros(total + 1, dtype=torch.bool, device=cu_seq_lens_q.device)
        packed = flags.index_fill(0, cu_seq_lens_q[1:].long(), True)[:total].view(shape)
        starts = packed if starts is None else starts | packed.to(starts.device)
    return starts


def _by_position(positions: Tensor, real: Tensor | None) -> Tensor:
    after_neighbour = positions[:, 1:] == positions[:, :-1] + 1
    first = positions[:, :1] == 0
    if real is None:
        return torch.cat([first, ~after_neighbour], dim=1)
    real = real.to(positions.device)
    positions = positions.expand(real.shape)
    index = torch.arange(real.shape[1], device=positions.device)
    latest = torch.where(real, index, -1).cummax(dim=1).values  # the last real token so far
    before = F.pad(latest[:, :-1], (1, 0), value=-1)  # the one before this token, -1 if none
    after_real = positions == positions.gather(1, before.clamp_min(0)) + 1
    goes_on = after_real | F.pad(after_neighbour.expand(len(real), -1), (1, 0))
    return real & torch.where(before < 0, positions == 0, ~goes_on)
