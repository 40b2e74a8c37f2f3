"""
Options of the command line from fields of classes of options, so that a new field is an option there too.

This module imports no other library: `--help` and usage errors are answered before torch is loaded.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from types import NoneType
from typing import Any, get_args, get_origin

from knnmoe_hf.cli import values
from knnmoe_hf.lookup.options import CHOICES, RetrievalOptions
from knnmoe_hf.training.options import BUILDERS, PROVENANCE, BuildOptions

BUILD_FIELDS = {field.name: field for field in fields(BuildOptions)}
MEMORY_FIELDS = {field.name: field for field in fields(RetrievalOptions)}
_NAMES = re.compile("|".join(rf"\b{name}\b" for name in BUILD_FIELDS | MEMORY_FIELDS if "_" in name))
_ALIASES = {"dataset_text_field": "text_column"}
_WORDS = {"routing_width": ("union",), "value_experts": ("all",)}  # beside integers
_NAMED = CHOICES | {"builder": tuple(BUILDERS), "save_provenance": PROVENANCE}


def option(name: str) -> str:
    """`--name-of-an-option`."""
    return f"--{name.replace('_', '-')}"


def add(group, name: str, kind: Any, default: Any, help: str, alias: str | None = None, many: bool = False) -> None:
    """
    Adds an option.

    Args:
        group: a parser or a group of one.
        name: with underscores.
        kind: a conversion from a word; None for an option that is on or off.
        default: what it has if it is not given.
        help: a sentence.
        alias: another name.
        many: whether it takes several values, and may be repeated.
    """
    names = [option(one) for one in (name, alias) if one]
    help = _NAMES.sub(lambda found: option(found[0]), help.removesuffix(".").replace("%", "%%"))
    how: dict[str, Any] = dict(dest=name, help=help, default=None)
    if kind is None:
        how["action"] = argparse.BooleanOptionalAction
    else:
        how |= dict(type=kind, metavar=getattr(kind, "metavar", name.rpartition("_")[2].upper()))
        how |= dict(action="extend", nargs="+") if many else {}
    group.add_argument(*names, **how).default = default


def with_default(help: str, default: Any) -> str:
    """A sentence that ends with the default, if there is one and the sentence does not name it."""
    said = default is not None and default is not False and "default" not in help
    return f"{help.removesuffix('.')}; default {default}." if said else help


def add_fields(group, of: Mapping[str, Field], names: Iterable[str], said: bool = True, **defaults: Any) -> None:
    """
    Options for some fields of a class of options.

    Args:
        group: a parser or a group of one.
        of: all fields by name.
        names: of the fields.
        said: whether the help says the defaults.
        defaults: in place of the fields' own; None for what is to be left to another default.
    """
    for name in names:
        field = of[name]
        help, default = field.metadata["help"], defaults.get(name, field.default)
        if name in _WORDS:
            help = f"{help.removesuffix('.')}; {' or '.join(('a number', *_WORDS[name]))}."
        kind, many = _kind(name, field.type)
        help = with_default(help, default) if said else help
        add(group, name, kind, defaults[name] if name in defaults else default, help, _ALIASES.get(name), many)


def _kind(name: str, annotation: Any) -> tuple[Any, bool]:
    """The conversion for a field's type, and whether it takes several values."""
    types = [one for one in get_args(annotation) or (annotation,) if one is not NoneType]
    if get_origin(annotation) is list or get_origin(types[0]) is list:
        (element,) = get_args(annotation if get_origin(annotation) is list else types[0])
        return _kind(name, element)[0], True
    if name in _NAMED:
        return values.one_of(_NAMED[name]), False
    if bool in types:
        return None, False
    if float in types:
        return values.number(whole_stays=int in types), False
    return (_whole(name) if int in types else values.text), False


def _whole(name: str) -> Any:
    """The conversion for an integer; that it is in range is checked by the class of options."""
    return values.whole(1, also=_WORDS[name]) if name in _WORDS else values.whole()
