"""One way to word an error: the bad value, what is allowed, the way out."""

from typing import Any


def shown(value: Any) -> str:
    """`repr(value)`, cut to 80 characters, for a one-sentence error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class MemoryFileError(ValueError):
    """A memory's file is missing, truncated, edited or of another format; the message names it and the reason."""


class MemoryMismatchError(ValueError):
    """A sound memory that does not belong to this model, value space or key codec."""


class UnsupportedModelError(ValueError):
    """A model whose routing cannot be changed from a hook on its gates."""
