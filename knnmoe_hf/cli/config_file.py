"""`--config file.yaml`: options from a file, as the words that would be typed for them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from knnmoe_hf.errors import in_one_line, shown

if TYPE_CHECKING:
    from knnmoe_hf.cli.parser import Parser

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_EMPTY = ("", "~", "null")


def words_of_file(path: str, parser: "Parser", given: set[int]) -> list[str]:
    """
    The options that a file asks for, as words of the command line, so that they are checked alike.

    Args:
        path: of a YAML file, a mapping of options (with dashes or underscores) to values or lists of values.
        parser: of the command.
        given: ids of the actions that the command line names itself, which win.

    Raises:
        ValueError: for a file that cannot be read, an unknown or repeated option, or a value that cannot be written
            on a command line.
    """
    words, seen = [], {}
    for key, value in _mapping(path):
        where = f"--config {path}, line {key.start_mark.line + 1}"
        action = _action(key, parser, where)
        if id(action) in seen:
            raise ValueError(f"{where}: {key.value} is there already, in line {seen[id(action)]}: keep one of the two")
        seen[id(action)] = key.start_mark.line + 1
        found = _words(action, value, where)
        if id(action) not in given:
            words += found
    return words


def _mapping(path: str) -> list[tuple]:
    """Keys and values of the file's mapping, as YAML nodes: text as it was written, with the line it was found in."""
    import yaml

    name = f"--config {path}"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or in_one_line(error)
        raise ValueError(f"{name} cannot be read ({reason}): name a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} is no YAML ({in_one_line(error)}): write lines such as 'gamma: 0.2'") from error
    if node is None or node.value == "":  # nothing but comments
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{name} is not a mapping: write lines such as 'gamma: 0.2'")
    return node.value


def _action(key, parser: "Parser", where: str) -> argparse.Action:
    written = key.value if isinstance(key.value, str) else shown(key.value)
    name = f"--{written.lstrip('-').replace('_', '-')}"
    action = parser.options().get(name)
    if action is None or name.startswith("--no-"):
        positive = name.replace("--no-", "--", 1)
        if action is not None and positive in parser.options():
            raise ValueError(f"{where}: write '{positive[2:]}: false' for {written}")
        raise ValueError(f"{where}: {parser.unknown(name)}")
    if action.dest in ("config", "help"):
        raise ValueError(f"{where}: {written} is for the command line only")
    return action


def _words(action: argparse.Action, value, where: str) -> list[str]:
    name = action.option_strings[0]
    items = value.value if isinstance(value.value, list) else [value]
    if value.id == "mapping" or any(item.id != "scalar" for item in items):
        raise ValueError(f"{where}: the value of {name} is nested: write one value, or a list of values")
    if any(item.style is None and item.value in _EMPTY for item in items) or not items:
        raise ValueError(f"{where}: {name} has no value: give it one, or leave the line out")
    if action.nargs == 0:
        return _switch(name, action, items, where)
    if value.id == "sequence" and not isinstance(action, argparse._AppendAction):
        raise ValueError(f"{where}: {name} takes one value and no list")
    return [f"{name}={item.value}" for item in items]


def _switch(name: str, action: argparse.Action, items: list, where: str) -> list[str]:
    word = items[0].value.lower() if len(items) == 1 else ""
    if word not in _TRUE + _FALSE:
        raise ValueError(f"{where}: {name} is {shown(items[0].value)}: write true or false")
    if word in _TRUE:
        return [name]
    return [other for other in action.option_strings if other == f"--no-{name[2:]}"]
