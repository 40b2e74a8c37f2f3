"""
Holding out the last examples of a memory, to score their text with the memory of the other examples.

A calibration holds out the last of all. A verdict is measured on others, those before them, so that nothing is fitted
to the text that it is measured on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.evaluation.references import References
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.verdict import HELD_OUT_SHARE, MOST_WINDOWS

_MOST, _SHARE, _GAP = 16, HELD_OUT_SHARE, 2  # at most 16 examples, one in 8, and 2 more left out before them


@dataclass(frozen=True)
class HeldOut:
    """
    Attributes:
        rows: the held-out examples, as `prepare_dataset` returns them; their targets are the tokens that the memory
            has a row for.
        rest: (N,) bool, the memory's rows to score them with.
    """

    rows: list[dict]
    rest: Tensor


def hold_out(memory: RoutingMemory) -> HeldOut | None:
    """
    Holds out the last eighth of a memory's examples, at most 16.

    The two examples before them (one, if one is held out) are neither scored nor kept in the memory: adjacent
    examples of a dataset are often parts of one document.

    Copies of held-out examples are not in the rest either (see `without_copies`).

    Returns:
        The held-out part; None if the memory has no provenance, fewer than eight examples, or hardly any but copies.
    """
    return _held_out(memory.provenance, 0, _MOST) if memory.provenance is not None else None


def hold_out_for_verdict(references: Provenance) -> HeldOut | None:
    """
    Holds out another eighth of the references, at most 256: those before the ones that `hold_out` leaves out.

    Neither these examples, nor two before them, nor what `hold_out` leaves out are in the rest.

    Returns:
        As `hold_out`.
    """
    return _held_out(references, _MOST, MOST_WINDOWS)


def _held_out(provenance: Provenance, last: int, most: int) -> HeldOut | None:
    """
    Holds out an eighth of the examples, at most `most`, with the gap before them.

    If `last` is not 0, the end of the data set is left alone: as many examples, at most `last`, with their gap. They
    are neither held out nor in the rest.
    """
    tokens = provenance.tokens()
    ids = list(tokens)
    count = min(most, len(ids) // _SHARE)
    if count == 0:
        return None
    later = min(last, count)
    end = len(ids) - later - min(_GAP, later)
    left_out = torch.tensor(ids[end - count - min(_GAP, count) :])
    held = ids[end - count : end]
    rows = [_row(id, tokens[id], provenance.positions[provenance.example_ids == id]) for id in held]
    return without_copies(HeldOut(rows, ~torch.isin(provenance.example_ids, left_out)), provenance)


def without_copies(held: HeldOut, provenance: Provenance) -> HeldOut | None:
    """
    Takes examples that overlap held-out ones out of the rest, and then held-out ones that still overlap it.

    A memory that has a copy of an example would look good on it, and only on it. Where nothing overlaps, the result is
    `held` itself; None if nothing is left on either side.
    """
    copied = _copied(held, provenance)
    if not copied.any():
        return held
    tokens = provenance.tokens()
    ids = [id for id in provenance.example_ids[held.rest].unique().tolist() if id in tokens]
    twins = References.of_rows([row for row, twin in zip(held.rows, copied) if twin])
    overlapping = twins.overlapping([_whole(tokens[id]) for id in ids])
    rest = held.rest & ~torch.isin(provenance.example_ids, torch.tensor(ids)[overlapping])
    copied = _copied(HeldOut(held.rows, rest), provenance)
    rows = [row for row, twin in zip(held.rows, copied) if not twin]
    return HeldOut(rows, rest) if rows and rest.any() else None


def _copied(held: HeldOut, provenance: Provenance) -> Tensor:
    """(n,) bool: whether the rest has the text of each held-out example too."""
    return References.of(provenance.select(held.rest)).overlapping(held.rows)


def _whole(input_ids: Tensor) -> dict:
    """An example all of whose tokens are targets."""
    return {"input_ids": input_ids, "labels": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _row(example_id: int, input_ids: Tensor, positions: Tensor) -> dict:
    labels = torch.full_like(input_ids, IGNORED)
    targets = positions.long() + 1  # the target of a row is the token after it
    labels[targets] = input_ids[targets]
    return {
        "input_ids": input_ids.tolist(),
        "labels": labels.tolist(),
        "attention_mask": [1] * len(input_ids),
        "example_id": example_id,
    }
