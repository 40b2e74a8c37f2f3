"""The tokens that a trace keeps: their ids, and which token each goes on from, through caches of any kind."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from knnmoe_hf.models.cache_rows import UNKNOWN, keep_numbers, numbers_beside
from knnmoe_hf.models.predecessors import CallLayout, is_paged, named_arguments

FIRST = -1
"""What a token goes on from that begins its sequence."""


class TracedCall(NamedTuple):
    """
    A forward of the decoder that is traced, with T = B * S tokens.

    Attributes:
        numbers: (T,) int64, the number of each token in the trace; -1 for padding and for tokens that are not kept.
        places: (n,) int64, which of the T tokens are kept.
        slots: (B, past + S) int64, the numbers of all tokens that are in the cache after the call; None without slots.
    """

    numbers: Tensor
    places: Tensor
    slots: Tensor | None

    @property
    def kept(self) -> Tensor:
        """(n,) int64, the numbers of the tokens that are kept."""
        return self.numbers[self.places]


class TracedTokens:
    """
    The tokens of a trace, in the order of the calls; padding has no number.

    Args:
        max_tokens: that are kept, the first ones.

    Attributes:
        seen: real tokens of all calls.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens, self.seen = max_tokens, 0
        self._ids: list[Tensor] = []
        self._previous: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._ids))

    @property
    def ids(self) -> Tensor:
        """(n,) int64, the id of each token; -1 where a call was given embeddings in place of ids."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._ids])

    @property
    def previous(self) -> Tensor:
        """(n,) int64, the number of the token that each goes on from; `FIRST` for none, `UNKNOWN` if not traced."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._previous])

    def begin(self, args: tuple, kwargs: dict, decoder: nn.Module) -> TracedCall:
        """Numbers the tokens of a call, before it changes its cache."""
        call = named_arguments(args, kwargs)
        layout = CallLayout(call, decoder)
        rows, length = layout.rows, layout.length
        real = torch.ones(rows * length, dtype=torch.bool) if layout.real is None else layout.real.cpu()
        places = real.nonzero().squeeze(-1)[: self.max_tokens - len(self)]
        numbers = torch.full((rows * length,), FIRST)
        numbers[places] = torch.arange(len(self), len(self) + len(places))
        if is_paged(call):  # of continuous batching: several sequences in one row, whose past is not in slots
            slots, previous = None, torch.full((rows * length,), UNKNOWN)
        else:
            past = int(layout.past)
            slots = torch.cat([numbers_beside(call.get("past_key_values"), rows, past), numbers.view(rows, -1)], dim=1)
            previous = _numbers_before(layout, past, real.view(rows, length), slots).flatten()
        ids = call.get("input_ids")
        ids = torch.full_like(numbers, -1) if ids is None else ids.detach().cpu().flatten().long()
        self.seen += int(real.sum())
        self._ids.append(ids[places])
        self._previous.append(previous[places])
        return TracedCall(numbers, places, slots)

    def end(self, call: TracedCall, args: tuple, kwargs: dict, output) -> None:
        """Keeps the numbers of a call's tokens beside its cache, which the call may have made."""
        cache = named_arguments(args, kwargs).get("past_key_values")
        if cache is None:
            parts = output if isinstance(output, tuple) else output.values()
            cache = next((part for part in parts if isinstance(part, Cache)), None)
        if cache is not None and call.slots is not None:
            keep_numbers(cache, call.slots)

    def sequences(self) -> list[Tensor]:
        """
        The numbers of the tokens of each sequence, from its first token on, (length,) int64.

        There is one for each token that none goes on from; those that share a beginning, as of beams, each have it.
        Sequences whose beginning is not known, or whose ids are not, are left out.
        """
        previous, ids = self.previous.tolist(), self.ids.tolist()
        continued = set(previous)
        found = []
        for number in range(len(previous)):
            if number in continued:
                continue
            path = []
            while number >= 0 and ids[number] >= 0:
                path.append(number)
                number = previous[number]
            if path and number == FIRST:
                found.append(torch.tensor(path[::-1]))
        return found


def _numbers_before(layout: CallLayout, past: int, real: Tensor, slots: Tensor) -> Tensor:
    """
    The number of the token that each goes on from.

    Args:
        layout: of the call.
        past: filled slots before the call.
        real: (B, S) bool.
        slots: (B, past + S) int64, the number in each slot.

    Returns:
        (B, S) int64; `FIRST` where a token goes on from nothing.
    """
    sources = layout.sources()
    if sources.slots is not None:
        before = sources.slots.cpu().expand(real.shape)
    else:
        place = torch.arange(real.shape[1]).expand(real.shape)
        last = torch.where(real, place, -1).cummax(dim=1).values  # the last real token up to each place
        last = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
        entry = torch.full((len(real), 1), past - 1) if sources.entry is None else sources.entry.cpu()[:, None]
        before = torch.where(last >= 0, past + last, entry)
        restarts = sources.links.restarts
        if restarts is not None:
            before = before.masked_fill(restarts.cpu().expand(real.shape), -1)
    return torch.where(before >= 0, slots.gather(1, before.clamp_min(0)), FIRST)
