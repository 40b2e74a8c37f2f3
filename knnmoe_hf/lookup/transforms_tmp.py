"""`torch.func` and forward-mode differentiation, which compiled code has to keep out of."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Found = TypeVar("Found")

# PyTorch has no public names for these; one without them has no transforms to keep out of, as far as anybody can tell
_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_functorch = getattr(torch._C, "_functorch", None)


def plain(*tensors: Tensor) -> bool:
    """
    Whether tensors are no more than their numbers, so that compiled code may read them.

    Inside a transform of `torch.func` a tensor has no storage, and one that was made just now neither; where forward
    mode differentiates, it may have a tangent, of which compiled code knows nothing.
    """
    for tensor in tensors:  # asked at each token in each layer, for which a generator takes twice as long
        if type(tensor) is not Tensor:
            return False
    return getattr(forward_ad, "_current_level", -1) < 0 and not _active()


def of_numbers(function: Callable[[Tensor], Found], tensor: Tensor) -> Found:
    """
    What a function gives for the numbers of a detached tensor, with no transform of `torch.func` at work.

    Raises:
        NotImplementedError: for a tensor that `torch.func.vmap` makes of several.
    """
    if torch.compiler.is_compiling() or not _active():
        return function(tensor)
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            raise NotImplementedError(
                "torch.func.vmap over what a memory's rows are searched for is not supported: map over rows of one "
                "batch instead (input_ids), or inside disable_memory."
            )
        tensor = _functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        return function(tensor)
