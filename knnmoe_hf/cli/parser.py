"""The parser of the commands: no abbreviations, errors of one line, a typo answered with the nearest option."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from knnmoe_hf.cli.config_file import words_of_file
from knnmoe_hf.errors import shown

RENAMED = {"--no-provenance": "--save-provenance none", "--solver-steps": "--builder-steps"}
"""Options of earlier versions, and what is to be written now."""

ONCE = (
    "config",
    "model",
    "output",
    "task",
    "dataset",
    "split",
    "test_dataset",
    "test_split",
    "off_dataset",
    "off_split",
    "revision",
    "subfolder",
    "token",
)
"""What names something that is read or written: of two names one would be dropped without a word."""


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that a mistyped one is likely to stand for, if any."""
    plain = {name.lstrip("-").replace("_", "-"): name for name in allowed}
    found = difflib.get_close_matches(word.lstrip("-").replace("_", "-").lower(), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def suggestion(word: str, allowed: Iterable[str]) -> str:
    """`": did you mean X?"`, or nothing where no allowed word is near."""
    near = nearest(word, allowed)
    return f": did you mean {near}?" if near is not None else ""


class Parser(argparse.ArgumentParser):
    """
    A parser of one command, or of the command's name.

    Attributes:
        refused: `{option: why it is not there}`, for options that a user may well look for.
        checks: called with the parsed options; a ValueError of theirs is a usage error.
        options_from_file: whether `--config FILE` holds options of the command line.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.refused: dict[str, str] = {}
        self.checks: list[Callable[[argparse.Namespace], None]] = []
        self.options_from_file = True

    def error(self, message: str):
        """Exits with 2, after one line on stderr."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see {self.prog} --help\n")

    def parse_known_args(self, args: Sequence[str], namespace=None):
        """As in argparse; words of a `--config` file come before `args`, and what is unknown is an error at once."""
        args = list(args)
        self._check_names(args)
        self._check_once(args)
        if self.options_from_file and "--config" in self.options():
            args = [*self._configured(args), *args]
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{shown(unknown[0])} is one word too many")
        try:
            for check in self.checks:
                check(found)
        except ValueError as error:
            self.error(as_options(str(error), self.options()))
        return found, unknown

    def shorten_usage(self) -> None:
        """Makes the usage name what is required, and not the dozens of options."""
        words = []
        for action in self._actions:
            metavar = action.metavar or action.dest.upper()
            if not action.option_strings:
                words.append(action.dest if action.nargs is None else f"[{action.dest}]")
            elif action.required:
                words.append(f"{action.option_strings[0]} {metavar}")
        self.usage = " ".join([self.prog, *words, "[options]"])

    def options(self) -> Mapping[str, argparse.Action]:
        """Every option's action by its name on the command line."""
        return self._option_string_actions

    def action(self, word: str) -> argparse.Action | None:
        """The action that a word of the command line names, None for a value or an unknown option."""
        return self.options().get(word.partition("=")[0])

    def _check_names(self, args: Sequence[str]) -> None:
        for word in args:
            if word == "--":
                return
            name = word.partition("=")[0]
            if not _is_option(word) or name in self.options():
                continue
            self.error(self.unknown(name))

    def _check_once(self, args: Sequence[str]) -> None:
        ends = args.index("--") if "--" in args else len(args)
        actions = [self.action(word) for word in args[:ends] if _is_option(word)]
        for action in actions:
            if action.dest in ONCE and not isinstance(action, argparse._AppendAction) and actions.count(action) > 1:
                several = ", or name several files by their folder or a pattern" if "dataset" in action.dest else ""
                self.error(f"{action.option_strings[0]} is given twice: keep one of the two{several}")

    def unknown(self, name: str) -> str:
        """What is said of an option that this command does not have."""
        if name in RENAMED:
            return f"{name} is {RENAMED[name]} now"
        if name in self.refused:
            return f"{name} is not an option of {self.prog}: {self.refused[name]}"
        return f"there is no option {shown(name)}{suggestion(name, self.options())}"

    def _configured(self, args: Sequence[str]) -> list[str]:
        ends = args.index("--") if "--" in args else len(args)
        given = {id(self.action(word)) for word in args[:ends] if _is_option(word)}
        found = [i for i, word in enumerate(args[:ends]) if word.partition("=")[0] == "--config"]
        if not found:
            return []
        word, following = args[found[0]], args[found[0] + 1 : found[0] + 2]
        path = word.partition("=")[2] if "=" in word else "".join(following)
        if not path or ("=" not in word and _is_option(path)):
            self.error("--config needs the name of a file")
        try:
            return words_of_file(path, self, given)
        except ValueError as error:
            self.error(str(error))


def _is_option(word: str) -> bool:
    """Whether argparse takes a word for an option: it begins with a dash and is neither a number nor a sentence."""
    return word[:1] == "-" and len(word) > 1 and " " not in word and not re.fullmatch(r"-\d+|-\d*\.\d+", word)


def as_options(message: str, options: Mapping[str, argparse.Action]) -> str:
    """
    The message of a class of options in the words of the command line.

    `name=value` becomes `--name value`, and None, which cannot be written there, becomes what stands for it.
    """
    names = {action.dest: name for name, action in options.items() if name == f"--{action.dest.replace('_', '-')}"}
    first = next((name for name in names if message.startswith(f"{name}=")), None)
    for name, option in names.items():
        if options[option].nargs == 0:
            message = re.sub(rf"\b(?<!-){name}=True\b", option, message)
        message = re.sub(rf"\b(?<!-){name}=", f"{option} ", message)
    message = re.sub(r"\bTrue or False\b", "the option, or the option with no- before its name", message)
    return re.sub(r"\bNone\b", f"no {names[first]}" if first else "nothing", message).removesuffix(".")
