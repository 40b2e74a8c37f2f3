"""Several processes that do one piece of work: who does what, and how all get what each has found.

Everything that crosses between processes lies on the host, so it goes through gloo whatever the devices are. All
processes call each function alike, but for `send` and `receive`.
"""

import atexit
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor
from torch import distributed as dist

from knnmoe_hf.files import as_bytes

Item, Found = TypeVar("Item"), TypeVar("Found")
_PIECE = 2**24  # bytes that travel at once


class Processes:
    """
    The processes that work together; a single one needs no torch.distributed.

    Args:
        index: of this one among `count`.
        count: how many there are.
        timeout: seconds that one waits for another.
    """

    def __init__(self, index: int = 0, count: int = 1, timeout: float = 1800):
        self.index, self.count = index, count
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if count > 1 else None
        if self._group is not None:
            atexit.register(self._leave)

    def gather(self, thing: Any) -> list:
        """What each process gave, in the order of their indices."""
        if self._group is None:
            return [thing]
        found: list = [None] * self.count
        dist.all_gather_object(found, thing, group=self._group)
        return found

    def map(self, items: Iterable[Item], work: Callable[[Item], Found]) -> list[Found]:
        """What `work` makes of each item, in their order; the processes take turns at the items."""
        own = [work(item) for item in islice(items, self.index, None, self.count)]
        parts = self.gather(own)
        return [parts[place % self.count][place // self.count] for place in range(sum(map(len, parts)))]

    def owner(self, place: int) -> int:
        """The index of the process whose turn it is at the item of this place."""
        return place % self.count

    def send(self, tensor: Tensor, to: int) -> None:
        """Gives a contiguous tensor to the process `to`, which must `receive` it."""
        dist.send(as_bytes(tensor), to, group=self._group)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fills a contiguous tensor with what the process `source` sends."""
        dist.recv(as_bytes(tensor), source, group=self._group)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fills a contiguous tensor with what it is in the process `source`, a piece at a time."""
        if self._group is not None:
            for piece in as_bytes(tensor).split(_PIECE):
                dist.broadcast(piece, source, group=self._group)

    def all_reduce_bytes(self, tensor: Tensor) -> None:
        """Fills a contiguous tensor of which each process has other rows, and zeros elsewhere, with those of all."""
        if self._group is not None:
            for piece in as_bytes(tensor).split(_PIECE):
                dist.all_reduce(piece, group=self._group)  # of bytes: a sum of floats would make 0.0 of -0.0

    def _leave(self) -> None:
        """Ends the group's threads before the interpreter does; they last as long as anything refers to the group."""
        group, self._group = self._group, None
        with suppress(ValueError, RuntimeError, AssertionError):  # it is gone already, with all others
            dist.destroy_process_group(group)


ALONE = Processes()
"""A process that works by itself."""
