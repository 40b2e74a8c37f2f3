"""The tokens of one forward of a decoder: padding and sequence starts from its arguments, sums kept in its cache."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.lookup.sequence import SequenceState, Tokens
from knnmoe_hf.models.continuous_batching import PagedState, keep_paged
from knnmoe_hf.models.kv_state import CacheState, StateOwner, keep_sums

if TYPE_CHECKING:
    from knnmoe_hf.models.gate_watch import GateWatch

_FORBIDDEN = -1e4  # in additive masks; biases of single positions are far smaller
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


def named_arguments(args: tuple, kwargs: dict) -> dict:
    """The arguments of a decoder's forward by name; the positional ones are named in the order of the signature."""
    return dict(zip(_POSITIONAL, args)) | kwargs


def shape_of(call: dict) -> tuple[int, int]:
    """(B, S): number of rows, and of new tokens in each row."""
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    return tokens.shape[0], tokens.shape[1]


RoutingOverride = Callable[[Tensor, GateOutput, Tokens], GateOutput | None]
"""`override(x, output, tokens)`: from a gate's input (T, d), its output and the call's tokens to the output that
replaces the gate's; None keeps it."""


class Overrides(dict):
    """
    The routing overrides attached under one name, `{layer: RoutingOverride}`.

    Attributes:
        owner: identifies the running sums of these overrides in a KV cache.
        watches: `{layer: GateWatch}`, the gates that they are about, as they were; empty if any will do.
    """

    watches: Mapping[int, "GateWatch"] = MappingProxyType({})

    def __init__(self, overrides: Mapping[int, RoutingOverride]):
        super().__init__(overrides)
        self.owner = StateOwner()


class CallTokens(Tokens):
    """
    The tokens of a decoder's forward, and the overrides that were in force when it began.

    Args:
        call: arguments of the forward by name.
        overrides: they decide the routing of the whole forward, whatever is switched meanwhile.

    Attributes:
        routed: layers whose gate has run with these tokens.
    """

    def __init__(self, call: dict, overrides: Overrides):
        self.overrides, self.owner = overrides, overrides.owner
        self.routed: set[int] = set()
        super().__init__(*shape_of(call), real=real_tokens(call), state=_state_before(call, self.owner))
        self._call = {name: call.get(name) for name in ("position_ids", "cu_seq_lens_q")}

    def restarts(self) -> Tensor | None:
        # computed lazily: most forwards never need it
        return sequence_starts(**self._call, shape=self.shape, real=self.real)


def _state_before(call: dict, owner: StateOwner) -> SequenceState | None:
    if _is_paged(call):
        return PagedState(call, owner)
    cache = call.get("past_key_values")
    return None if cache is None else CacheState(cache, owner, shape_of(call)[1])


def _is_paged(call: dict) -> bool:
    return call.get("write_index") is not None


def keep_state(call: dict, output, tokens: CallTokens | None) -> None:
    """
    Stores the running sums of a forward in its cache, for the next forward on the same sequences.

    Args:
        call: the forward's arguments by name.
        output: what the forward returned.
        tokens: the tokens of the forward; None if no overrides were in force.
    """
    if _is_paged(call):
        return keep_paged(call, tokens)
    cache = call.get("past_key_values")
    if cache is None:  # the decoder may have created one and returned it
        parts = output if isinstance(output, tuple) else output.values()
        cache = next((part for part in parts if isinstance(part, Cache)), None)
    if cache is not None:
        keep_sums(cache, tokens, None if tokens is None else tokens.owner)


def real_tokens(call: dict) -> Tensor | None:
    """
    Which new tokens are not padding, read from the attention mask: (B * S,) bool, or None if all are real.

    transformers passes a decoder one of: a (B, L) mask over cached and new tokens, a (B, 1, S, L) mask (boolean or
    additive), or a dict of such masks by attention type. In a 4-D mask the real tokens are those that attend to
    themselves; an additive mask forbids that by -1e4 or less. Packed rows and continuous batches, whose masks are per
    sequence, hold real tokens only.
    """
    mask = call.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or call.get("cu_seq_lens_q") is not None:
        return None
    (rows, length), cache = shape_of(call), call.get("past_key_values")  # B, S
    past = cache.get_seq_length() if cache is not None else 0
    step = torch.arange(length, device=mask.device)
    if mask.dim() == 2:
        if isinstance(past, Tensor):  # of a static cache: indexing by it needs no device synchronisation
            new = mask[:, (past + length).clamp_max(mask.shape[1]) - length + step]
        else:
            new = mask[:, : past + length][:, -length:]
        return new.reshape(-1).bool()
    column = step + past - _first_column(mask, length, cache)
    itself = mask[:, 0].expand(rows, -1, -1)[:, step, column]  # (B, S)
    return (itself if itself.dtype == torch.bool else itself > _FORBIDDEN).reshape(-1)


def _first_column(mask: Tensor, length: int, cache) -> int:
    """Position in the sequence of a 4-D mask's first column; above 0 for a sliding window that has moved on."""
    layers = cache.layers if cache is not None else []
    sizes = [layer.get_mask_sizes(length) for layer in layers if isinstance(layer, CacheLayerMixin)]
    return next((offset for columns, offset in sizes if columns == mask.shape[-1]), 0)


def sequence_starts(
    position_ids: Tensor | None, cu_seq_lens_q: Tensor | None, shape: tuple[int, int], real: Tensor | None
) -> Tensor | None:
    """
    Which new tokens are the first of a sequence: (B, S) or (1, S) bool, or None if no argument shows it.

    `position_ids` (B or 1, S): a real token starts a sequence if its position is one more neither than that of the
    last real token before it nor than that of the token beside it; the first real token of a row starts one if its
    position is 0. `cu_seq_lens_q`: cumulative lengths of the sequences in packed rows and continuous batches.
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
    latest = torch.where(real, index, -1).cummax(dim=1).values  # the last real token up to this one
    before = F.pad(latest[:, :-1], (1, 0), value=-1)  # the last real token before this one, -1 if there is none
    after_real = positions == positions.gather(1, before.clamp_min(0)) + 1
    continues = after_real | F.pad(after_neighbour.expand(len(real), -1), (1, 0))
    return real & torch.where(before < 0, positions == 0, ~continues)
