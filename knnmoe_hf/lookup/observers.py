"""
Who is told of lookups: the observers that watch in the calling thread or asyncio task.

A lookup's observers are read as an attribute of this module, `getattr(observers, key)`: torch.compile cannot trace the
reading of a context variable, but it can guard an attribute of a module, which it reads anew before each call of a
compiled graph.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from knnmoe_hf.lookup.events import LookupObserver

if TYPE_CHECKING:
    from knnmoe_hf.lookup.torch_lookup import TorchLookup

_PREFIX = "of_lookup_"


class _Watch:
    """A `watching` context: its observer, the keys of its lookups, and whether another thread or task ended it."""

    def __init__(self, observer: LookupObserver, keys: frozenset[str]):
        self.observer, self.keys, self.ended = observer, keys, False


_watching: ContextVar[tuple[_Watch, ...]] = ContextVar("knnmoe_hf_watching", default=())


def observers_key(handle: int) -> str:
    """Name of the attribute of this module that holds the observers of a lookup."""
    return f"{_PREFIX}{handle}"


def __getattr__(key: str) -> tuple[LookupObserver, ...]:
    """The observers of a lookup in the calling thread or task."""
    if not key.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {key!r}")
    return tuple(watch.observer for watch in _watching.get() if key in watch.keys and not watch.ended)


@contextmanager
def watching(lookups: Iterable["TorchLookup"], observer: LookupObserver) -> Iterator[None]:
    """Inside this context `observer` is called for these lookups where the calling thread or task makes them."""
    watch = _Watch(observer, frozenset(lookup.observers_key for lookup in lookups))
    _watching.set((*(other for other in _watching.get() if not other.ended), watch))
    try:
        yield
    finally:
        kept = tuple(other for other in _watching.get() if other is not watch)
        watch.ended = len(kept) == len(_watching.get())
        _watching.set(kept)
