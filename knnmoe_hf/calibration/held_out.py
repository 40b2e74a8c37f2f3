"""The last references of a memory, to judge it by as if they were new text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnmoe_hf.training.data import IGNORED

if TYPE_CHECKING:
    from knnmoe_hf.memory.memory import RoutingMemory

_MOST, _SHARE, _GAP = 16, 8, 2


@dataclass(frozen=True)
class HeldOut:
    """
    Attributes:
        rows: examples as `prepare_dataset` returns them; only tokens that the memory has a row for are targets.
        rest: (N,) bool, the memory's rows of other examples.
    """

    rows: list[dict]
    rest: Tensor


def hold_out(memory: "RoutingMemory") -> HeldOut | None:
    """
    Sets an eighth of the examples apart, sixteen at most, the last ones.

    Those just before them are in neither part: neighbours in a data set are often of one document.

    Returns:
        None if the memory has no provenance or fewer than eight examples.
    """
    known = memory.provenance
    tokens = known.tokens() if known is not None else {}
    names = list(tokens)
    count = min(_MOST, len(names) // _SHARE)
    if count == 0:
        return None
    apart = torch.tensor(names[-(count + min(_GAP, count)) :])
    rows = [_row(name, tokens[name], known.positions[known.example_ids == name]) for name in names[-count:]]
    return HeldOut(rows, ~torch.isin(known.example_ids, apart))


def _row(name: int, ids: Tensor, positions: Tensor) -> dict:
    labels = torch.full_like(ids, IGNORED)
    following = positions.long() + 1  # a row's target is the token after its own
    labels[following] = ids[following]
    return {
        "input_ids": ids.tolist(),
        "labels": labels.tolist(),
        "attention_mask": [1] * len(ids),
        "example_id": name,
    }
