"""Rows that hold several documents one after another, as packing makes them: where each begins and ends."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from knnmoe_hf.data.columns import Refusal, as_integers, as_plain, named

CUMULATED = ("cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
LONGEST = ("max_length_q", "max_length_k")  # what goes with cu_seq_lens_q and cu_seq_lens_k
BORDERS = ("position_ids", "seq_lengths", "seq_idx", *CUMULATED, *LONGEST)
"""Columns that say where the documents of a row are."""


def documents(row: Mapping[str, Any], mask: Sequence[int]) -> list[slice]:
    """
    The documents of a row: all of it, unless columns of `BORDERS` say otherwise; those of padding alone are left out.

    Args:
        row: its columns.
        mask: 1 for a token, 0 for padding, for each of the row's S tokens.

    Raises:
        Refusal: for columns that are not borders, or that disagree.
    """
    found = {name: _starts(name, row[name], mask) for name in BORDERS if name in row and name not in LONGEST}
    starts = next(iter(found.values()), frozenset())
    for name, others in found.items():
        if others != starts:
            first = next(iter(found))
            raise Refusal(
                f"{named([first, name])} put borders at different tokens", "give one of them, or make them agree"
            )
    length = len(mask)
    cut = sorted({0, length} | {start for start in starts if start < length})
    slices = [slice(*pair) for pair in pairwise(cut)]
    kept = [one for one in slices if any(mask[one])]
    for name in LONGEST:
        if name in row:
            _check_longest(name, row[name], slices)
    return kept


def _starts(name: str, value: Any, mask: Sequence[int]) -> frozenset[int]:
    """Tokens other than the first one at which a document begins; those at padding say nothing and are left out."""
    numbers = as_integers(value, name)
    if name == "seq_lengths":
        if any(one < 0 for one in numbers) or sum(numbers) != len(mask):
            reason = f"column 'seq_lengths' adds up to {sum(numbers)} for {len(mask)} input_ids"
            raise Refusal(reason, "give the length of each document, which add up to that of input_ids")
        starts = list(accumulate(numbers))
    elif name in CUMULATED:
        steady = all(low <= high for low, high in pairwise(numbers))
        if not steady or numbers[:1] != [0] or numbers[-1] != len(mask):
            reason = f"column {name!r} does not rise from 0 to {len(mask)}, the number of input_ids"
            raise Refusal(reason, "give 0 and the end of each document")
        starts = numbers
    elif len(numbers) != len(mask):
        raise Refusal(
            f"column {name!r} has {len(numbers)} values for {len(mask)} input_ids", "give lists of the same length"
        )
    else:
        starts = (_restarts if name == "position_ids" else _changes)(numbers, mask)
    return frozenset(_first_token(start, mask) for start in starts) - {_first_token(0, mask), len(mask)}


def _first_token(start: int, mask: Sequence[int]) -> int:
    """The first token from here on that is not padding, so that columns may count padding to either document."""
    return next((place for place in range(start, len(mask)) if mask[place]), len(mask))


def _restarts(positions: Sequence[int], mask: Sequence[int]) -> list[int]:
    starts, before = [], None
    for place, position in enumerate(positions):
        if not mask[place]:
            continue
        if position == 0:
            starts.append(place)
        elif before is None or position != before + 1:
            raise Refusal(
                f"column 'position_ids' has {position} at place {place}, where a document would go on or begin anew",
                "count each document's tokens from 0",
            )
        before = position
    return starts


def _changes(numbers: Sequence[int], mask: Sequence[int]) -> list[int]:
    starts, seen, before = [], set(), None
    for place, number in enumerate(numbers):
        if not mask[place] or number == before:
            continue
        if number in seen:
            raise Refusal(f"column 'seq_idx' has document {number} in two pieces", "give each document in one piece")
        seen.add(number)
        starts.append(place)
        before = number
    return starts


def _check_longest(name: str, value: Any, slices: Sequence[slice]) -> None:
    longest = max((one.stop - one.start for one in slices), default=0)
    if as_plain(value) != longest:
        raise Refusal(
            f"column {name!r} is {as_plain(value)}, and the longest document has {longest} tokens", "correct it"
        )
