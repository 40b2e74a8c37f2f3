"""The tensors of a gate, and telling fast, without reading a value, that none was assigned or changed in place."""

import itertools
import weakref
from collections.abc import Callable
from operator import is_

from torch import Tensor, nn
from torch.nn.utils import parametrize

from knnmoe_hf.models.offload import accelerate_hooks

ARGUMENTS = ("the first argument", "the second argument")  # names of what a block hands to its gate
_TABLES = ("_parameters", "_buffers")
_Mark = tuple[Callable[[], Tensor | None], int, int | None]  # reference, address, version


class GateMarks:
    """
    Which attributes and tensors a gate had when it ran, the addresses of the tensors and PyTorch's counts of their
    changes in place. A change through `tensor.data` alters none of them.

    Tensors are referred to weakly: the gate's hook holds this, and weights that are gone are not to stay for it.

    Args:
        gate: the router.
        args: what its block hands to it besides its input.
    """

    def __init__(self, gate: nn.Module, args: tuple):
        own = vars(gate)
        self._forward, self._size = type(gate).forward, len(own)
        self._names = tuple(name for name in own if name[0] != "_" and name != "training")
        self._values = tuple(map(own.get, self._names))
        self._parts = tuple((part, GateMarks(part, ())) for part in gate.children())
        self._tensors = tuple((table, name, _mark(one)) for table in _TABLES for name, one in own[table].items())
        self._args = tuple(map(_mark, args))

    @staticmethod
    def can_tell(gate: nn.Module) -> bool:
        """
        Whether the gate's own tensors are what it computes with: not if they are somewhere else between forwards,
        split over processes, or computed anew each time.
        """
        tensors = [*gate.parameters(), *gate.buffers()]
        return not parametrize.is_parametrized(gate) and not any(
            one.device.type == "meta" or hasattr(one, "to_local") for one in tensors
        )

    def fit(self, gate: nn.Module, args: tuple) -> bool:
        """Whether nothing of the gate has changed since; False may be a change that makes no difference."""
        own = vars(gate)
        return (
            len(own) == self._size
            and type(gate).forward is self._forward
            and all(map(is_, map(own.get, self._names), self._values))
            and self.fit_tensors(gate, args)
        )

    def fit_tensors(self, gate: nn.Module, args: tuple) -> bool:
        """As `fit`, for the tensors alone."""
        own = vars(gate)
        if len(own["_parameters"]) + len(own["_buffers"]) != len(self._tensors) or len(args) != len(self._args):
            return False
        for table, name, mark in self._tensors:
            if not _fits(own[table].get(name), mark):
                return False
        for one, mark in zip(args, self._args):
            if not _fits(one, mark):
                return False
        if not self._parts and not own["_modules"]:
            return True
        parts = tuple(gate.children())
        return len(parts) == len(self._parts) and all(
            part is one and marks.fit(part, ()) for part, (one, marks) in zip(parts, self._parts)
        )


def tensors_of(gate: nn.Module, args: tuple) -> dict[str, Tensor]:
    """
    What it computes with, by name: its weights and buffers, and what its block hands to it.

    As they are used: with an adapter's part, and from where they are offloaded to.
    """
    if gate._modules:
        found = dict(itertools.chain(gate.named_parameters(), gate.named_buffers()))
    else:  # the same, ten times as fast
        found = {name: one for table in (gate._parameters, gate._buffers) for name, one in table.items()}
        found = {name: one for name, one in found.items() if one is not None}
    if parametrize.is_parametrized(gate):
        found = {name: tensor for name, tensor in found.items() if not name.startswith("parametrizations.")}
        found |= {name: getattr(gate, name) for name in gate.parametrizations}
    for name in [name for name, tensor in found.items() if tensor.device.type == "meta"]:
        holder, _, own = name.rpartition(".")
        for hook in accelerate_hooks(gate.get_submodule(holder)):
            if (offloaded := getattr(hook, "weights_map", None)) is not None:
                found[name] = offloaded[own]
    found |= {name: arg for name, arg in zip(ARGUMENTS, args[1:]) if isinstance(arg, Tensor)}
    return {name: local(tensor.detach()) for name, tensor in found.items()}


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is split over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _mark(value: object) -> _Mark:
    if not isinstance(value, Tensor):
        return (lambda: value), 0, None
    return weakref.ref(value), value.data_ptr(), None if value.is_inference() else value._version


def _fits(value: object, mark: _Mark) -> bool:
    reference, address, version = mark
    if value is not reference():
        return False
    # the address first: an assignment to `data` may have taken the count of changes away
    return not isinstance(value, Tensor) or (
        value.data_ptr() == address and (version is None or value._version == version)
    )
