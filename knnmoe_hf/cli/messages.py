"""What a command says beside its results: notices, warnings and logs on stderr, one line each, each once."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_OWN = "knnmoe_hf"
_LIBRARIES = ("transformers", "datasets", "huggingface_hub", "accelerate", "peft", "torch")


class _OneLine(logging.Handler):
    """
    Writes records on one line of stderr each, unless the same was said before.

    Args:
        own: the least level of this library's records.
        others: the least level of all others.
    """

    def __init__(self, own: int, others: int):
        super().__init__()
        self.own, self.others, self.said = own, others, set()

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        if record.levelno < (self.own if record.name.partition(".")[0] == _OWN else self.others):
            return
        try:
            text = record.getMessage()
        except Exception:  # arguments that do not fit the message
            text = str(record.msg)
        self.say(text, record.levelno)

    def say(self, text: str, level: int) -> None:
        """Writes a text with the name of its level."""
        text = " ".join(text.split())
        if text not in self.said:
            self.said.add(text)
            write(f"{logging.getLevelName(level).lower()}: {text}" if level >= logging.WARNING else text)


def write(text: str) -> None:
    """Writes a line on stderr, above the progress bars if there are any."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        if tqdm is not None and len(getattr(tqdm, "_instances", ())):
            tqdm.write(f"knnmoe: {text}", file=sys.stderr)
        else:
            print(f"knnmoe: {text}", file=sys.stderr)
    except OSError:  # nobody reads stderr any more
        return


def notice(options: argparse.Namespace, text: str) -> None:
    """Says something that is neither a result nor an error; nothing with `--quiet`."""
    if not options.quiet:
        write(text)


def progress(options: argparse.Namespace, label: str) -> str | None:
    """The label of a progress bar, None with `--quiet`."""
    return None if options.quiet else label


@contextmanager
def spoken(options: argparse.Namespace) -> Iterator[None]:
    """
    Inside this context, logs and warnings of all libraries are written as this module says.

    `--verbose` shows what this library logs, `--quiet` errors alone. Of several processes only the first one speaks.
    """
    options.quiet = options.quiet or int(os.environ.get("RANK") or 0) > 0
    least = logging.ERROR if options.quiet else logging.WARNING
    handler = _OneLine(logging.INFO if options.verbose and not options.quiet else least, least)
    undo = _hide_bars() if options.quiet else []
    before = {name: list(logging.getLogger(name).handlers) for name in (_OWN, *_LIBRARIES)}
    level = logging.getLogger(_OWN).level
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: (
                handler.say(str(message), logging.WARNING) if least <= logging.WARNING else None
            )
            _import_loggers()
            for name in before:
                # those of the libraries are their own ways to print; any of this library is a caller's
                kept = logging.getLogger(name).handlers if name == _OWN else []
                logging.getLogger(name).handlers = [*kept, handler]
            if options.verbose:
                logging.getLogger(_OWN).setLevel(logging.INFO)
            yield
    finally:
        for name, handlers in before.items():
            logging.getLogger(name).handlers = handlers
        logging.getLogger(_OWN).setLevel(level)
        for switch in undo:
            switch()


def _import_loggers() -> None:
    """Imports what sets up the loggers of the libraries, so that none does so later."""
    import datasets.utils.logging
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    for logging_of in (datasets.utils.logging, huggingface_hub.utils.logging, transformers.utils.logging):
        logging_of.get_logger()


def _hide_bars() -> list[Callable[[], None]]:
    """Switches the progress bars of the libraries off; returns what switches them on again."""
    import datasets.utils
    import huggingface_hub.utils
    import transformers.utils.logging as of_transformers

    of_transformers.disable_progress_bar()
    datasets.utils.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    return [
        of_transformers.enable_progress_bar,
        datasets.utils.enable_progress_bars,
        huggingface_hub.utils.enable_progress_bars,
    ]
