"""
What a memory's card says that cannot be read from its rows: what its maker states, how it was built, and what was
measured beside the verdict.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.memory.measurements import LONGEST, Measurements, is_line, printable
from knnmoe_hf.memory.numbers import check

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")


@dataclass(frozen=True)
class CardData:
    """
    What the card of a memory says beside what its rows and its verdict tell; part of the manifest.

    The names are those of `transformers.Trainer.create_model_card`.

    Attributes:
        model_name: title of the card; None for one that is made of the data's and the base model's names.
        license: of the reference data, an identifier of the Hub (`"cc-by-4.0"`) or any other name; None if it was not
            stated.
        language: codes as the Hub takes them, `"en"`, `"code"`, `"multilingual"`.
        tags: for the Hub, beside the library's own.
        finetuned_from: repository of the base model on the Hub, where the memory was built from a local folder.
        dataset_tags: repositories of the reference data on the Hub.
        dataset: names of the reference data; those of local files without their folders.
        build: options of the build that made the rows, by name; empty if it is not known or if there were several.
        measured: None if nothing was measured, or not with these rows and options.
        history: what was done to the memory since it was built, first things first, each a line.

    Raises:
        ValueError: for contents of another form.
    """

    model_name: str | None = None
    license: str | None = None
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    finetuned_from: str | None = None
    dataset_tags: list[str] = field(default_factory=list)
    dataset: list[str] = field(default_factory=list)
    build: Mapping[str, str | int | float | None] = field(default_factory=dict)
    measured: Measurements | None = None
    history: list[str] = field(default_factory=list)

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> "CardData":
        """From the plain JSON values that `dataclasses.asdict` makes of one."""
        if set(entry) != {one.name for one in fields(cls)}:
            raise ValueError(f"{shown(sorted(entry))} are not the entries of a CardData")
        measured = entry["measured"]
        return cls(**dict(entry) | {"measured": None if measured is None else Measurements.of_json(measured)})

    def __post_init__(self):
        for name in STATED:
            check_stated(name, getattr(self, name))
        build = self.build
        sound = {
            "build": isinstance(build, Mapping) and all(is_line(name) and _is_plain(build[name]) for name in build),
            "measured": self.measured is None or isinstance(self.measured, Measurements),
            "history": isinstance(self.history, list) and all(map(is_line, self.history)),
        }
        check(sound, self)

    def stated(self, **given: Any) -> "CardData":
        """
        With other statements of its maker; a single text stands for a list of one, None leaves what there is.

        Raises:
            TypeError: for a name that is none of `STATED`.
            ValueError: for a value that is not allowed.
        """
        if unknown := set(given) - set(STATED):
            raise TypeError(f"{shown(min(unknown))} is nothing that a card states: choose among {', '.join(STATED)}.")
        return replace(self, **{name: as_stated(name, value) for name, value in given.items() if value is not None})

    def noted(self, *lines: str) -> "CardData":
        """With more lines of history."""
        return replace(self, history=[*self.history, *map(printable, lines)])

    def merged(self, other: "CardData") -> "CardData":
        """
        Of the rows of both: the data of both, and what both agree on; nothing is known of how it does.

        The history of the other memory comes after this one's, and is said to be the other's.
        """
        alike = {name: _if_equal(getattr(self, name), getattr(other, name)) for name in _SINGLE}
        lists = {name: list(dict.fromkeys(getattr(self, name) + getattr(other, name))) for name in _LISTS}
        build = self.build if self.build == other.build else {}
        theirs = [line if line.startswith(_OTHER) else f"{_OTHER}{line}" for line in other.history]
        return CardData(**alike, **lists, build=build, history=self.history).noted(*theirs)

    def to_json(self) -> dict:
        """As plain JSON values."""
        return asdict(self)


_OTHER = "in a memory that was merged into it: "
_SINGLE = ("model_name", "license", "finetuned_from")
_LISTS = ("language", "tags", "dataset_tags", "dataset")
STATED = _SINGLE + _LISTS
"""What the maker of a memory states for its card."""


def as_stated(name: str, value: Any) -> Any:
    """A statement as `CardData` keeps it, checked: a single text of a list as a list of one."""
    value = [value] if name in _LISTS and isinstance(value, str) else value
    value = list(value) if name in _LISTS and isinstance(value, (tuple, set)) else value
    check_stated(name, value)
    return value


def check_stated(name: str, value: Any) -> None:
    """
    Checks a statement for a card.

    Raises:
        ValueError: for a value that is not allowed.
    """
    if name in _SINGLE:
        if value is None:
            return
        values, kind = [value], "a text"
    else:
        values, kind = value, "a text or a list of them"
    if not isinstance(values, list) or not all(map(is_line, values)):
        raise ValueError(
            f"{name}={shown(value)} is not allowed: use {kind}, each on one line of 1 to {LONGEST} letters."
        )
    for one in values:
        if name == "language" and not _LANGUAGE.fullmatch(one):
            raise ValueError(
                f"language={shown(one)} is not allowed: use a code such as 'en' or 'pt-BR', 'code' or 'multilingual'."
            )
        if name in ("finetuned_from", "dataset_tags") and (reason := why_no_repository(one)) is not None:
            raise ValueError(
                f"{name}={shown(one)} is not allowed: use the name of a repository of the Hub ({reason})."
            )


def why_no_repository(name: str) -> str | None:
    """Why no repository of the Hub can have this name; None if one can."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return in_one_line(error)
    return None


def _if_equal(mine: Any, theirs: Any) -> Any:
    return mine if mine == theirs else None


def _is_plain(value: Any) -> bool:
    return (
        value is None or type(value) in (bool, int) or type(value) is float and math.isfinite(value) or is_line(value)
    )
