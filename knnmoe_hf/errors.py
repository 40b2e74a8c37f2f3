"""One way to word an error: the bad value, what is allowed, the way out."""

from typing import Any


def shown(value: Any) -> str:
    """`repr(value)` on one line, cut to 80 characters, for a one-sentence error message."""
    try:
        text = " ".join(repr(value).splitlines())
    except ValueError:  # Python does not spell out integers of thousands of digits
        text = f"{type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else text[:77] + "..."


def in_one_line(error: BaseException) -> str:
    """What another library's error says, on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


class MemoryFileError(ValueError):
    """A memory's file is missing, truncated, edited or of another format; the message names it and the reason."""


class MemoryMismatchError(ValueError):
    """A sound memory that does not belong to this model, value space or key codec."""


class UnsupportedModelError(ValueError):
    """A model whose routing cannot be changed from a hook on its gates."""
