"""Threads that share a batch of queries, in code that does not hold Python's lock."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")


def in_parts(work: Callable[[slice], Part], count: int, least: int) -> list[Part]:
    """
    `work` of consecutive parts of `count` queries, at the same time: what each returned, in order.

    Args:
        work: gets a slice of the queries.
        count: of queries.
        least: queries that are worth a thread.
    """
    parts = max(1, min(count // least, torch.get_num_threads()))
    bounds = [count * part // parts for part in range(parts + 1)]
    mine, *others = map(slice, bounds, bounds[1:])
    asked = [_workers().submit(work, part) for part in others]
    return [work(mine), *(part.result() for part in asked)]


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """They wait for their part without taking a core, as PyTorch's own do for a while."""
    return ThreadPoolExecutor(os.cpu_count(), "knnmoe-search")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # its threads do not live on in a forked process
