"""Noticing that a gate was changed after a memory was attached: the memory's rows are about the gate as it was.

Each forward asks whether the gate, or a tensor of it, was assigned or changed in place, which reads no values. If so,
the values are compared, and if they differ too, the gate is run on a few fixed inputs and its logits decide: merging
an adapter or changing the dtype changes the tensors and hardly the logits.

Only a change in place through `weight.data` leaves no mark. For that, some thousand values of each tensor are compared
on the CPU in calls of several tokens, in each another part: a decoding step would wait for it longer than for anything
else here, and an accelerator would have to be waited for.

A gate that is being trained changes on purpose: what it has become is what later forwards are compared with.
"""

import copy
import itertools
import weakref
from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from knnmoe_hf import native
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.lookup.rules import GateOutput, Router, pad_slots
from knnmoe_hf.models.gate_marks import ARGUMENTS, GateMarks, local, tensors_of
from knnmoe_hf.models.trained_gates import TrainedGates, is_being_trained

_COMPARED = 4096  # values of a tensor that are compared at once, at least
_INPUTS = 16  # on which a gate is run again
# the largest difference of logits that does not count as a change, as a share of their root mean square
_TOLERANCE = 1e-5  # what rounding in float32 may do
_ROUNDED = {torch.bfloat16: 2**-5, torch.float16: 2**-8}  # where weights were rounded anew: another dtype, a merge
_ALIKE_IF_ROUNDED = 0.75  # share of the fixed inputs that must then still get the same experts and weights
_SETTINGS = (int, float, str, type(None))

_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, "GateWatch"] = weakref.WeakValueDictionary()


@torch.library.custom_op("knnmoe_hf::check_gate", mutates_args=())
def _check_in_graph(logits: Tensor, tensors: list[Tensor], same_settings: bool, trained: bool, handle: int) -> Tensor:
    """The comparison as an operator of a compiled graph; returns a copy of the logits, so that it is not left out."""
    _by_handle[handle].check_tensors(tensors, same_settings, trained, is_step=len(logits) == 1)
    return logits.clone()


@_check_in_graph.register_fake
def _(logits: Tensor, tensors: list[Tensor], same_settings: bool, trained: bool, handle: int) -> Tensor:
    return torch.empty_like(logits)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.tensors = len(inputs[1])


_check_in_graph.register_autograd(
    lambda ctx, gradient: (gradient, [None] * ctx.tensors, None, None, None), setup_context=_remember
)


class GateWatch:
    """
    One gate as it was when a memory was attached.

    Args:
        layer: index of its decoder layer, for messages.
        gate: the router; to be made while it runs, when its weights are where they are needed.
        args: of its forward: its input, and what else its block hands to it, such as a correction bias.
        router: the rule by which it routed, and its width.
        trained_gates: those of the same model.
    """

    def __init__(self, layer: int, gate: nn.Module, args: tuple, router: Router, trained_gates: TrainedGates):
        self.layer, self.router, self._trained_gates = layer, copy.deepcopy(router), trained_gates
        self._may_be_trained = False  # whether it was being trained when it last ran
        generator = torch.Generator().manual_seed(layer)
        self._inputs = torch.randn(_INPUTS, args[0].shape[-1], generator=generator)
        self._logits, *_ = self._run(gate, args)
        self._turn = 0
        self._graph_marks: list[tuple] = []  # of the tensors that a compiled graph last found unchanged
        self._keep(gate, args)
        self._handle = next(_handles)
        _by_handle[self._handle] = self

    def __getstate__(self) -> dict:
        # a copied model has other tensors and methods: what they compute is compared when it first runs
        return vars(self) | {"_gate_marks": None, "_marks": [], "_graph_marks": [], "_forward": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _handle=next(_handles))
        _by_handle[self._handle] = self

    def checked(self, gate: nn.Module, args: tuple, output: GateOutput, is_step: bool = False) -> GateOutput:
        """
        Compares the gate that has just run with what it was.

        Args:
            gate, args: as for the constructor.
            output: what it returned.
            is_step: whether it ran on one token of each sequence: no values are read then unless something was marked.

        Returns:
            `output`.

        Raises:
            MemoryMismatchError: if it computes something else, and was not being trained now or when it last ran.
        """
        if torch.compiler.is_compiling():
            return self._checked_in_graph(gate, args, output)
        if is_being_trained(gate):
            self._may_be_trained = True
        marks = self._gate_marks
        unmarked = marks is not None and marks.fit(gate, args[1:])
        if not (unmarked and (is_step or self._device.type != "cpu")):
            self._check(gate, args, output, unmarked)
        return output

    def _check(self, gate: nn.Module, args: tuple, output: GateOutput, unmarked: bool) -> None:
        if args[0].device != self._device or native.in_transform():  # the lookup refuses both
            return
        same_width = output[1].shape[1] == self.router.top_k
        if same_width and (self._is_same_in_part(gate, args) if unmarked else self._is_as_it_was(gate, args)):
            return
        logits, weights, ids = self._run(gate, args)
        dtypes = _dtypes(tensors_of(gate, args).values(), args)
        rounded = self._adapted or parametrize.is_parametrized(gate) or dtypes != self._dtypes
        trained = not _close(logits, self._logits, dtypes | self._dtypes if rounded else ())
        if trained and not self._may_be_trained:
            raise self._changed("computes other logits")
        if not self._routes_alike(logits, weights, ids, at_least=_ALIKE_IF_ROUNDED if rounded else 1.0):
            raise self._changed("chooses or weights experts otherwise")
        if trained:
            self._goes_on_trained(is_being_trained(gate))
        if rounded or trained:
            self._logits = logits
        self._keep(gate, args)

    def _checked_in_graph(self, gate: nn.Module, args: tuple, output: GateOutput) -> GateOutput:
        # traced by torch.compile: the gate's tensors are compared in each run of the graph
        if self._device.type != "cpu":
            return output
        tensors = [local(attrgetter(name)(gate)) for name in self._names if name not in ARGUMENTS]
        tensors += [arg for arg in args[1:] if isinstance(arg, Tensor)]
        same = all(getattr(gate, name, None) == value for name, value in self._settings.items())
        top_k = self.router.top_k
        same = same and output[1].shape[1] == top_k
        # tracing goes on with the shapes that it expects, though the operator will raise where they differ
        routed = (pad_slots(table[:, :top_k], top_k) for table in output[1:])
        return _check_in_graph(output[0], tensors, same, is_being_trained(gate), self._handle), *routed

    def check_tensors(self, tensors: list[Tensor], same_settings: bool, trained: bool, is_step: bool) -> None:
        """
        Raises as `checked` does.

        Args:
            tensors: the gate's, in the order in which they were kept.
            same_settings: whether it would choose as many experts as it did, in the same way.
            trained: whether it is being trained.
            is_step: as in `checked`.
        """
        if not same_settings:
            raise self._changed("chooses or weights experts otherwise")
        self._may_be_trained = self._may_be_trained or trained
        marks = list(map(_mark, tensors))
        if is_step and marks == self._graph_marks:
            return
        if all(map(_equal, tensors, self._tensors)):
            self._graph_marks = marks
            return
        found, kept = dict(zip(self._names, tensors)), dict(zip(self._names, self._tensors))
        only_rounded = all(_equal(one, other.to(one.dtype)) for one, other in zip(tensors, self._tensors))
        others = [name for name in self._names if name not in ("weight", "bias")]
        linear = "weight" in found and all(_equal(found[name], kept[name]) for name in others)
        dtypes = {tensor.dtype for tensor in tensors} if self._adapted else ()
        if not only_rounded and not (linear and _close(self._linear(found), self._linear(kept), dtypes)):
            if not self._may_be_trained:
                raise self._changed("computes other logits")
            self._goes_on_trained(trained)
        self._tensors, self._graph_marks = [tensor.detach().clone() for tensor in tensors], marks

    def _goes_on_trained(self, still: bool) -> None:
        self._trained_gates.add(self.layer)
        self._may_be_trained = still  # if not, the next change is none of training

    def _keep(self, gate: nn.Module, args: tuple) -> None:
        """Takes the gate as it is now for unchanged."""
        found = tensors_of(gate, args)
        tensors = list(found.values())
        self._names, self._device, self._dtypes = tuple(found), args[0].device, _dtypes(tensors, args)
        self._adapted = parametrize.is_parametrized(gate)
        self._settings, self._forward = _settings(gate), _forward(gate)
        on_cpu = self._device.type == "cpu"
        self._tensors = [tensor.clone() for tensor in tensors] if on_cpu else []
        self._mark(gate, args, tensors)

    def _mark(self, gate: nn.Module, args: tuple, tensors: list[Tensor]) -> None:
        self._gate_marks = GateMarks(gate, args[1:]) if GateMarks.can_tell(gate) else None
        self._marks = list(map(_mark, tensors))

    def _is_as_it_was(self, gate: nn.Module, args: tuple) -> bool:
        """Whether something was assigned or changed in place that makes no difference."""
        if _settings(gate) != self._settings or _forward(gate) != self._forward:
            return False
        found = tensors_of(gate, args)
        if tuple(found) != self._names:
            return False
        tensors, marks = list(found.values()), self._gate_marks
        same = self._marks == list(map(_mark, tensors)) if marks is None else marks.fit_tensors(gate, args[1:])
        if self._device.type == "cpu":
            same_values = self._is_same_in_part(gate, args) if same else all(map(_equal, tensors, self._tensors))
        else:
            same_values = same
        if same_values and not (same and marks is None):
            self._mark(gate, args, tensors)
        return same_values

    def _is_same_in_part(self, gate: nn.Module, args: tuple) -> bool:
        """Whether some of the values are the same, in each call others, as no mark tells of changes through `data`."""
        self._turn += 1
        return all(
            _equal_in_part(one, kept, self._turn) for one, kept in zip(tensors_of(gate, args).values(), self._tensors)
        )

    @torch.no_grad()
    def _run(self, gate: nn.Module, args: tuple) -> GateOutput:
        x = args[0]
        inputs = self._inputs.view(*[1] * (x.dim() - 2), *self._inputs.shape).to(x.device, x.dtype)
        # `forward` itself: no hook of the gate is to see this, and accelerate wraps it to bring offloaded weights
        logits, weights, ids = gate.forward(inputs, *args[1:])
        return logits.flatten(0, -2), weights.flatten(0, -2), ids.flatten(0, -2)

    def _linear(self, tensors: dict[str, Tensor]) -> Tensor:
        """Logits of the fixed inputs in float32."""
        weight, bias = tensors["weight"].detach(), tensors.get("bias")
        return F.linear(self._inputs, weight.float(), None if bias is None else bias.detach().float())

    def _routes_alike(self, logits: Tensor, weights: Tensor, ids: Tensor, at_least: float) -> bool:
        """Whether at least this share of the fixed inputs get what the kept rule makes of their logits."""
        own_weights, own_ids = self.router.rule.routed(logits, self.router.top_k, weights.dtype)
        if ids.shape != own_ids.shape:
            return False
        same = (ids == own_ids) & torch.isclose(weights.float(), own_weights.float(), rtol=1e-2, atol=1e-6)
        return same.all(dim=-1).float().mean().item() >= at_least

    def _changed(self, what: str) -> MemoryMismatchError:
        return MemoryMismatchError(
            f"the gate of layer {self.layer} {what} than when the memory was attached, because it or its weights were "
            "changed: use detach_memory(model) and attach_memory again, which checks whether the memory still belongs "
            "to the model, or disable_memory(model)."
        )


def _settings(gate: nn.Module) -> dict:
    """The gate's attributes that are not tensors, such as its top-k."""
    return {
        name: value
        for name, value in vars(gate).items()
        if isinstance(value, _SETTINGS) and name[0] != "_" and name != "training"
    }


def _forward(gate: nn.Module) -> tuple:
    return vars(gate).get("forward"), type(gate).forward


def _dtypes(tensors: Iterable[Tensor], args: tuple) -> set[torch.dtype]:
    """The dtypes in which a gate computes from these tensors and arguments."""
    return {tensor.dtype for tensor in tensors} | {args[0].dtype}


def _close(logits: Tensor, kept: Tensor, rounded_to: Iterable[torch.dtype]) -> bool:
    """Whether logits are those that were kept, up to what rounding weights to these dtypes does."""
    tolerance = max((_ROUNDED.get(dtype, _TOLERANCE) for dtype in rounded_to), default=_TOLERANCE)
    logits, kept = logits.float().cpu(), kept.float().cpu()
    limit = tolerance * kept.square().mean().sqrt()
    return logits.shape == kept.shape and bool(((logits - kept).abs() <= limit).all())


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _equal_in_part(one: Tensor, other: Tensor, turn: int) -> bool:
    """Compares some values of each row, all of them in as many turns as a value in so many is compared."""
    step = max(1, one.numel() // _COMPARED)
    return torch.equal(one.flatten()[turn % step :: step], other.flatten()[turn % step :: step])


def _mark(tensor: Tensor) -> tuple:
    """What differs after most changes of a tensor; reads nothing of it."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.dtype
