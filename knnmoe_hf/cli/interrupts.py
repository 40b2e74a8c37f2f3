"""Ctrl-C at any moment: noted when it comes, because libraries turn a KeyboardInterrupt into errors of their own."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from importlib.machinery import ExtensionFileLoader
from types import CodeType, FrameType

from knnmoe_hf.errors import is_of_interrupt

_LATER = 0.05  # seconds until an interrupt that could not be raised comes again
_LOADER = ExtensionFileLoader
_EXTENSIONS = {_LOADER.create_module.__code__, _LOADER.exec_module.__code__}
"""Where extension modules are made: many in C++ end the process, or take an interrupt for another error."""
_lines: list[str] = []


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
        self._before, self._hook, self._alarm, self._of_children = None, None, None, None

    def __enter__(self) -> "Interrupts":
        _lines.clear()
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be handled
            self._before = signal.signal(signal.SIGINT, self._handle)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_) -> None:
        if self._hook is not None:
            self._disarm()
            if self._of_children is not None:
                signal.signal(signal.SIGCHLD, self._of_children)
            sys.unraisablehook = self._hook
            before = self._before if self._before is not None else signal.SIG_DFL
            signal.signal(signal.SIGINT, signal.SIG_IGN if self._ignore_later else before)

    def end(self) -> None:
        """From now on nothing interrupts: what is left is to say what happened."""
        self._ended = True

    def said(self) -> int:
        """Says that the command was interrupted, on a line of its own; returns its exit code."""
        close_progress_bars()
        with suppress(OSError):  # nobody reads stderr any more
            for line in [*_lines, "interrupted"]:
                print(f"knnmoe: {line}", file=sys.stderr)
        return 130

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            os._exit(130)  # a worker process; the first process says what happened
        self.seen = True
        self._ignore_children()
        if self._ended:
            return
        if _is_in(frame, {self._unraisable.__code__, *_EXTENSIONS}):
            return self._come_again()
        raise KeyboardInterrupt

    def _ignore_children(self) -> None:
        """Ctrl-C ends worker processes too; PyTorch's SIGCHLD handler would then raise wherever this process is."""
        if self._of_children is None:
            self._of_children = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL

    def _unraisable(self, event) -> None:
        """An interrupt that came where nothing can be raised, as in `__del__`, comes again."""
        if is_of_interrupt(event.exc_value):
            self._come_again()
        elif not self.seen:
            self._hook(event)

    def _come_again(self) -> None:
        """By a timer: a signal of now would be handled in the same place still."""
        before = signal.signal(signal.SIGALRM, self._handle) or signal.SIG_DFL
        self._alarm = before if self._alarm is None else self._alarm
        signal.setitimer(signal.ITIMER_REAL, _LATER)

    def _disarm(self) -> None:
        if self._alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)


@contextmanager
def says_when_interrupted(line: str) -> Iterator[None]:
    """If an interrupt ends this context, this line is printed too: at the very end, where a second one is harmless."""
    _lines.append(line)
    yield
    _lines.remove(line)


def _is_in(frame: FrameType | None, codes: Set[CodeType]) -> bool:
    """Whether a frame is of one of these codes, or was called from one."""
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


def close_progress_bars() -> None:
    """Ends the lines of progress bars that are still open, so that what is printed next has a line of its own."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # which is not there while it is imported
    for bar in list(getattr(tqdm, "_instances", ())):
        try:
            bar.close()
        except Exception:  # a bar that is half made
            continue
