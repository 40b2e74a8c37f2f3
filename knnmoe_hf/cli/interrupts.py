"""Ctrl-C at any moment: noted when it comes, because libraries turn a KeyboardInterrupt into errors of their own."""

import os
import signal
import sys
import threading
from types import FrameType


class Interrupts:
    """
    Inside this context, SIGINT raises KeyboardInterrupt and is remembered.

    Args:
        ignore_later: whether SIGINT is ignored from the end of the context on, as the process ends there.

    Attributes:
        seen: whether one has come.
    """

    def __init__(self, ignore_later: bool = False):
        self.seen, self._ignore_later = False, ignore_later
        self._process, self._ended = os.getpid(), False
        self._before, self._hook = None, None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be handled
            self._before = signal.signal(signal.SIGINT, self._handle)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_) -> None:
        if self._hook is not None:
            sys.unraisablehook = self._hook
            before = self._before if self._before is not None else signal.SIG_DFL
            signal.signal(signal.SIGINT, signal.SIG_IGN if self._ignore_later else before)

    def end(self) -> None:
        """From now on nothing interrupts: what is left is to say what happened."""
        self._ended = True

    def said(self) -> int:
        """Says that the command was interrupted, on a line of its own; returns its exit code."""
        close_progress_bars()
        try:
            print("knnmoe: interrupted", file=sys.stderr)
        except OSError:  # nobody reads stderr any more
            pass
        return 130

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            os._exit(130)  # a worker process; the first process says what happened
        self.seen = True
        if not self._ended:
            raise KeyboardInterrupt

    def _unraisable(self, event) -> None:
        """An interrupt that came where nothing can be raised, as in `__del__`, comes again."""
        if event.exc_type is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        elif not self.seen:
            self._hook(event)


def close_progress_bars() -> None:
    """Ends the lines of progress bars that are still open, so that what is printed next has a line of its own."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        return
    for bar in list(getattr(tqdm.tqdm, "_instances", ())):
        try:
            bar.close()
        except Exception:  # a bar that is half made
            continue
