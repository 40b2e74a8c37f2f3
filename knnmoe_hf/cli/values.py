"""What a word of the command line may be: numbers, choices. Errors name the word, what is allowed, the way out."""

import argparse
import math
from collections.abc import Callable, Sequence

from knnmoe_hf.cli.parser import suggestion
from knnmoe_hf.errors import shown

_TOO_LARGE = 2**63


def whole(least: int | None = None, below: int = _TOO_LARGE, also: Sequence[str] = ()) -> Callable[[str], int | str]:
    """A conversion to an integer from `least` to below `below`; words of `also` stay as they are."""

    def convert(word: str) -> int | str:
        if word in also:
            return word
        try:
            number = int(word)
        except ValueError:
            number = None
        if number is None or not (-_TOO_LARGE if least is None else least) <= number < below:
            size = "" if least is None else f" of at least {least}"
            others = "".join(f", or {other}" for other in also)
            limit = "" if number is None or number < below else f", below {'2**63' if below == _TOO_LARGE else below}"
            raise argparse.ArgumentTypeError(f"{shown(word)} is not allowed: use an integer{size}{limit}{others}")
        return number

    return _shown_as(convert, " or ".join(("N", *also)))


def number(
    least: float | None = None, below: float = math.inf, whole_stays: bool = False
) -> Callable[[str], float | int]:
    """A conversion to a finite number from `least` to below `below`; with `whole_stays`, `2` is an integer."""

    def convert(word: str) -> float:
        try:
            found = float(word)
        except ValueError:
            found = math.nan
        if not math.isfinite(found) or not (-math.inf if least is None else least) <= found < below:
            size = "" if least is None else f" of at least {least:g}"
            limit = "" if math.isinf(below) else f", below {below:g}"
            raise argparse.ArgumentTypeError(f"{shown(word)} is not allowed: use a finite number{size}{limit}")
        return (
            int(word) if whole_stays and found.is_integer() and "." not in word and "e" not in word.lower() else found
        )

    return _shown_as(convert, "X")


def text(word: str) -> str:
    """A word that is not empty."""
    if not word.strip():
        raise argparse.ArgumentTypeError("'' is not allowed: give a value, or leave the option out")
    return word


def one_of(allowed: Sequence[str], metavar: str | None = None) -> Callable[[str], str]:
    """A conversion that refuses all but these words, with the nearest one; the help shows them all, or `metavar`."""

    def convert(word: str) -> str:
        if word not in allowed:
            near = suggestion(word, allowed)
            raise argparse.ArgumentTypeError(
                f"{shown(word)} is not allowed{near or ':'} choose one of {', '.join(allowed)}"
            )
        return word

    return _shown_as(convert, metavar or f"{{{','.join(allowed)}}}")


def _shown_as(convert: Callable, metavar: str) -> Callable:
    """A conversion that the help shows by this word."""
    convert.metavar = metavar
    return convert


def encoding(word: str) -> str:
    """The name of an encoding of text that Python knows."""
    try:
        "".encode(word)
    except (LookupError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{shown(word)} is not an encoding: use the name of one, such as utf-8, utf-16, cp1252 or latin-1"
        ) from error
    return word
