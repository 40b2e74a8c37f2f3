"""Signals that this process sends itself where a function is called."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interrupted(first: str, then: str | None = None, number: int = signal.SIGINT) -> Iterator[list[str]]:
    """
    Inside this context a signal comes when a function is called, and another one when a second function is called
    after that.

    Args:
        first, then: qualified names of functions, or "NAME:n" for the n-th call.
        number: of the signals.

    Returns:
        The names that were reached.
    """
    reached: list[str] = []
    # Python forgets a profiler in which an exception is raised, but not the tracer beside it
    sys.setprofile(_sender(first, number, reached, after=0))
    if then is not None:
        sys.settrace(_sender(then, number, reached, after=1))
    try:
        yield reached
    finally:
        sys.setprofile(None)
        sys.settrace(None)


def _sender(place: str, number: int, reached: list[str], after: int) -> Callable:
    name, _, count = place.partition(":")
    left = int(count or 1)

    def look(frame, event, argument) -> None:
        nonlocal left
        if event == "call" and len(reached) == after and frame.f_code.co_qualname == name:
            left -= 1
            if not left:
                reached.append(name)
                os.kill(os.getpid(), number)

    return look
