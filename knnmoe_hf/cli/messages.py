"""What a command says beside its results: notices, warnings and logs on stderr, one line each, each once."""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

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

    def warn(self, message: Warning | str) -> None:
        """Writes a warning of the module `warnings`."""
        if self.others <= logging.WARNING:
            self.say(str(message), logging.WARNING)

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
    # importing datasets takes a second, and only commands that read data need it
    libraries = ["transformers", "huggingface_hub", *(["datasets"] if "encoding" in options else [])]
    for name in libraries:  # now, so that none of them sets up its logger later
        importlib.import_module(f"{name}.utils.logging").get_logger()
    loggers = {name: logging.getLogger(name) for name in (_OWN, *_LIBRARIES)}
    before = {name: (logger.handlers, logger.level) for name, logger in loggers.items()}
    try:
        for name, logger in loggers.items():
            # handlers of a library are its own way to print; those of this library are a caller's
            logger.handlers = [*(logger.handlers if name == _OWN else ()), handler]
        if options.verbose:
            loggers[_OWN].setLevel(logging.INFO)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: handler.warn(message)
            with _hidden_bars(libraries) if options.quiet else nullcontext():
                yield
    finally:
        for name, (handlers, level) in before.items():
            loggers[name].handlers = handlers
            loggers[name].setLevel(level)


@contextmanager
def _hidden_bars(libraries: list[str]) -> Iterator[None]:
    """Inside this context the progress bars of these libraries are hidden."""
    places = {"transformers": "transformers.utils.logging"}  # the others have their switches in `utils`
    modules = [importlib.import_module(places.get(name, f"{name}.utils")) for name in libraries]

    def switch(word: str) -> None:
        for module in modules:
            (getattr(module, f"{word}_progress_bars", None) or getattr(module, f"{word}_progress_bar"))()

    switch("disable")
    try:
        yield
    finally:
        switch("enable")
