"""
Several processes that work on one thing: which process does which part, and how each gets the results of all.

Whatever is exchanged lies on the host, so it goes through gloo whatever the devices are. Every process must make the
same calls in the same order, except for `send` and `receive`.
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

Item, Result = TypeVar("Item"), TypeVar("Result")
_CHUNK = 2**24  # bytes that are exchanged at once


class Processes:
    """
    The processes that work together; a single process needs no torch.distributed.

    Args:
        index: rank of this process.
        count: number of processes.
        timeout: seconds after which a process that waits for another one fails.
    """

    def __init__(self, index: int = 0, count: int = 1, timeout: float = 1800):
        self.index, self.count = index, count
        self.on_item: Callable[[], None] | None = None  # called after each item that this process does in `map`
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if count > 1 else None
        if self._group is not None:
            atexit.register(self._leave)

    def gather(self, value: Any) -> list:
        """The values of all processes, by index; they are pickled."""
        if self._group is None:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def map(self, items: Iterable[Item], work: Callable[[Item], Result]) -> list[Result]:
        """`work(item)` for each item, in the items' order; process p does items p, p + count, p + 2 * count, ..."""
        own = []
        for item in islice(items, self.index, None, self.count):
            own.append(work(item))
            if self.on_item is not None:
                self.on_item()
        parts = self.gather(own)
        return [parts[self.owner(place)][place // self.count] for place in range(sum(map(len, parts)))]

    def owner(self, place: int) -> int:
        """The index of the process that does the item at this place."""
        return place % self.count

    def send(self, tensor: Tensor, to: int) -> None:
        """Sends a contiguous tensor to the process `to`, which must call `receive`."""
        dist.send(as_bytes(tensor), to, group=self._group)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fills a contiguous tensor with the one that the process `source` sends."""
        dist.recv(as_bytes(tensor), source, group=self._group)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fills a contiguous tensor with the one of the process `source`."""
        if self._group is not None:
            for chunk in as_bytes(tensor).split(_CHUNK):
                dist.broadcast(chunk, source, group=self._group)

    def _leave(self) -> None:
        """Ends the group's threads before the interpreter ends; they live as long as anything refers to the group."""
        group, self._group = self._group, None
        with suppress(ValueError, RuntimeError, AssertionError):  # the group was destroyed already, with all others
            dist.destroy_process_group(group)


ALONE = Processes()
"""The only process."""
