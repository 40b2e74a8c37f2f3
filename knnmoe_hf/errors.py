"""Error classes, and helpers for messages of one sentence: the bad value, what is allowed, the way out."""

from typing import Any


def shown(value: Any) -> str:
    """`repr(value)` on one line, cut to 80 characters, for a one-sentence error message."""
    try:
        text = " ".join(repr(value).splitlines())
    except ValueError:  # Python does not spell out integers of thousands of digits
        text = f"{type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else text[:77] + "..."


def in_one_line(error: BaseException) -> str:
    """The message of another library's error, on one line of at most 300 characters, all of them printable."""
    text = " ".join(str(error).split())
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= 300 else text[:297] + "..."


def is_of_interrupt(error: BaseException | None) -> bool:
    """Whether an error is an interrupt, or what a library made of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def counted(count: int, noun: str) -> str:
    """A number of things: `1 row`, `1,200 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class MemoryFileError(ValueError):
    """A file of a memory is missing, truncated, edited or of another format; the message names it and the reason."""


class MemoryMismatchError(ValueError):
    """A memory that can be read, but does not belong to this model or cannot be read with these options."""


class BadRowError(ValueError):
    """A row of a data set that cannot be used; the message begins with its place."""


class UnsupportedModelError(ValueError):
    """A model whose routing cannot be changed from a hook on its gates."""


class NoSpaceError(OSError):
    """A disk, or what a user may have of it, is full; the message says what to do when there is room again."""
