"""Values of a row's columns, each checked by its type."""

from collections.abc import Mapping, Sequence
from typing import Any

from knnmoe_hf.errors import shown

IDS_FIT = 2**31  # examples are kept as int32


class Refusal(Exception):
    """
    A row that cannot be used.

    Args:
        reason: what is wrong with it.
        way_out: what to do about it.
        in_every_row: whether it concerns the data set and not this row, so that leaving the row out does not help.
    """

    def __init__(self, reason: str, way_out: str, in_every_row: bool = False):
        super().__init__(reason)
        self.reason, self.way_out, self.in_every_row = reason, way_out, in_every_row


def as_text(value: Any, column: str) -> str:
    """A text that is more than white space."""
    if not isinstance(value, str):
        raise Refusal(f"column {column!r} is {shown(value)} of type {type(value).__name__}", "give text")
    if not value.strip():
        raise Refusal(f"column {column!r} is empty", "give text")
    return str(value)  # a str of numpy too


def as_plain(value: Any) -> Any:
    """Arrays and tensors as lists and numbers; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_integers(value: Any, column: str) -> list[int]:
    """A list of integers, from any sequence of them, an array or a tensor."""
    values = as_plain(value)
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise Refusal(f"column {column!r} is {shown(value)}", "give a list of integers")
    if set(map(type, values)) <= {int}:
        return list(values)
    found = []
    for place, one in enumerate(map(as_plain, values)):
        if isinstance(one, Sequence) and not isinstance(one, (str, bytes)):
            raise Refusal(
                f"column {column!r} is a list of lists", "give one list of integers, without a batch dimension"
            )
        if type(one) is not int:
            raise Refusal(f"column {column!r} has {shown(one)} at place {place}", "give integers")
        found.append(one)
    return found


def as_bits(value: Any, column: str) -> list[int]:
    """A list of 0 and 1, or of truth values."""
    plain = as_plain(value)
    if isinstance(plain, Sequence) and not isinstance(plain, (str, bytes)):
        plain = [int(one) if isinstance(one, bool) else one for one in map(as_plain, plain)]
    bits = as_integers(plain, column)
    if other := set(bits) - {0, 1}:
        raise Refusal(f"column {column!r} has the value {shown(min(other))}", "give 0 and 1 only")
    return bits


def as_example_id(value: Any) -> int:
    """An example's own id."""
    one = as_plain(value)
    if type(one) is not int or not -(2**63) <= one < 2**63:
        raise Refusal(f"column 'example_id' is {shown(value)}", "give an integer of 64 bits, or drop the column")
    return one


def check_ids(ids: Sequence[int], vocab_size: int | None, column: str, tokenized_here: bool = False) -> None:
    """
    Checks that token ids are in the vocabulary.

    Args:
        ids: token ids.
        vocab_size: number of the model's input embeddings; None if it is not known.
        column: where the ids are from.
        tokenized_here: whether they are the tokenizer's, and not the user's.
    """
    size = vocab_size if vocab_size is not None else IDS_FIT
    if not ids or (min(ids) >= 0 and max(ids) < size):
        return
    place, one = next((place, one) for place, one in enumerate(ids) if not 0 <= one < size)
    known = f"the model's vocabulary of {size}" if vocab_size is not None else "any vocabulary"
    if tokenized_here:
        raise Refusal(
            f"the tokenizer makes token {one} of column {column!r}, outside of {known}: it is of another model",
            "pass the model's own tokenizer",
            in_every_row=True,
        )
    raise Refusal(
        f"column {column!r} has {one} at place {place}, outside of {known}",
        f"give integers from 0 to {size - 1}, made by the model's own tokenizer",
    )


def named(columns: Sequence[str]) -> str:
    """Names of columns in a sentence."""
    names = [repr(name) for name in columns]
    return f"column {names[0]}" if len(names) == 1 else f"columns {', '.join(names[:-1])} and {names[-1]}"


def ignoring(columns: Sequence[str]) -> str:
    """How columns are left out."""
    return f"ignore_columns={list(columns)} (--ignore-columns {' '.join(map(str, columns))})"


def with_values(row: Mapping[str, Any], ignored: frozenset[str]) -> dict[str, Any]:
    """The columns of a row that have a value and are not left out."""
    return {name: value for name, value in row.items() if not is_missing(value) and name not in ignored}


def is_missing(value: Any) -> bool:
    """Whether a table has no value here: None, or the NaN or NA that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"
