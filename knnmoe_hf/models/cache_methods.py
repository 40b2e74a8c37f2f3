"""Running sums follow a cache through its own methods: reordered, cropped, repeated, selected and reset with it.

The methods are extended once, in the class `Cache` itself: sums lie beside the layers and not among them, so nothing
else would pass a call on, and caches of any subclass may be given to a model. Caches without sums are not affected.
Numbers of tokens (`knnmoe_hf.models.cache_rows`) follow in the same way.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from knnmoe_hf.models.cache_rows import follow_method, take_numbers
from knnmoe_hf.models.predecessors import cached_length
from knnmoe_hf.models.sums import ATTRIBUTE, Sums, sums_beside


def _followed(kind: type[Cache], name: str, follow: Callable[[Sums, Cache, tuple], Sums | str | None]) -> None:
    original = vars(kind)[name]

    def follow_sums(self, *args, **kwargs):
        kept = sums_beside(self)
        if not isinstance(kept, Sums):
            if name == "reset" and kept is not None:
                delattr(self, ATTRIBUTE)
            return original(self, *args, **kwargs)
        kept = kept.traced(self)
        delattr(self, ATTRIBUTE)  # while the original runs, so that methods that call others follow only once
        try:
            result = original(self, *args, **kwargs)
            if isinstance(kept, Sums):
                kept = follow(kept, self, (*args, *kwargs.values()))
        finally:
            if kept is not None:
                setattr(self, ATTRIBUTE, kept)
        return result

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        numbers = take_numbers(self)  # removed meanwhile, so that methods that call others follow only once
        result = follow_sums(self, *args, **kwargs)
        if numbers is not None:
            follow_method(self, numbers, name, (*args, *kwargs.values()))
        return result

    method.follows_sums = True
    setattr(kind, name, method)


def _select(sums: Sums, cache: Cache, args: tuple) -> Sums:
    (rows,) = args
    values = sums.values
    return sums.changed(values[:, torch.as_tensor(rows, device=values.device)], cache)


def _repeat(sums: Sums, cache: Cache, args: tuple) -> Sums:
    (repeats,) = args
    return sums.changed(sums.values.repeat_interleave(repeats, dim=1), cache)


def _crop(sums: Sums, cache: Cache, args: tuple) -> Sums:
    past = cached_length(cache)  # not the number given: a layer may not do what it is asked to, as quantised ones do
    if isinstance(past, Tensor) or sums.length is None:
        return sums.changed(sums.values, cache)
    return sums.changed(sums.values[:, :, :past], cache)


def _reset(sums: Sums, cache: Cache, args: tuple) -> Sums | None:
    if sums.length is not None:
        return None
    # set to zero and not replaced, because compiled graphs hold the tensors' addresses
    sums.count.zero_()
    sums.table.values.zero_()
    sums.owner = sums.snapshot = None
    return sums


_METHODS = {
    "reorder_cache": _select,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _crop,
    "reset": _reset,
}


def follow_cache_methods(kind: type[Cache] = Cache) -> None:
    """Extends the methods of `Cache`, or those that one of its subclasses has of its own, once in a process."""
    for name, follow in _METHODS.items():
        own = vars(kind).get(name)
        if inspect.isfunction(own) and not getattr(own, "follows_sums", False):
            _followed(kind, name, follow)


def follow_replaced_methods(cache: Cache) -> None:
    """As `follow_cache_methods` for all subclasses that a cache belongs to."""
    for kind in type(cache).__mro__:
        if kind is not object:
            follow_cache_methods(kind)
