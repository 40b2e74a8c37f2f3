"""What a value of JSON must be to be taken for a count, a measurement or a text."""

import math
from collections.abc import Mapping
from typing import Any

from knnmoe_hf.errors import shown

SMALL = 1e-9
"""What is divided by is larger."""


def is_count(value: Any) -> bool:
    """Whether it is a whole number that is not negative."""
    return type(value) is int and value >= 0


def is_finite(value: Any) -> bool:
    """Whether it is a float, and neither infinite nor NaN."""
    return type(value) is float and math.isfinite(value)


def is_moderate(value: Any) -> bool:
    """Whether it is a float such that products of a few are finite in float32, as are quotients by `SMALL`."""
    return is_finite(value) and abs(value) <= 1 / SMALL


def is_text(value: Any) -> bool:
    """Whether it is a text."""
    return isinstance(value, str)


def are_texts(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list) and all(map(is_text, value))


def check(sound: Mapping[str, bool], record: Any) -> None:
    """
    Checks what was found of a record's entries.

    Args:
        sound: `{entry: whether it is what it should be}`.
        record: for the error.

    Raises:
        ValueError: naming the first entry that is not.
    """
    for name, right in sound.items():
        if not right:
            kind = type(record).__name__
            raise ValueError(f"{name} of a {kind} are not as its documentation says: {shown(record)}.")
