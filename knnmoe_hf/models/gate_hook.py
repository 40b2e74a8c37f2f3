"""The hook of one gate, and how the tokens of a forward get there."""

import inspect
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from knnmoe_hf.errors import UnsupportedModelError, shown
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.models.calls import CallTokens
from knnmoe_hf.models.logits_hook import forget_interrupted_logits

if TYPE_CHECKING:
    from knnmoe_hf.models.hooks import RoutingHooks

TOKENS = "knnmoe_tokens"  # keyword argument that the decoder passes on to each of its layers
current_layer = threading.local()  # `.call`: the `Call` of which this thread runs a layer, None between layers


class Call:
    """
    One forward of a decoder that carries hooks; it is referred to until its last layer has run for the last time.

    Attributes:
        hooks: of the decoder.
        tokens: of the call; None if no override was in force when it began.
        has_failed: whether it raised an `Exception`; PyTorch tells no hook of an interruption such as Ctrl-C.
        has_returned: whether the decoder returned; with gradient checkpointing its layers run again during backward.
        thread: in which it runs; None in a compiled graph.
    """

    def __init__(self, hooks: "RoutingHooks"):
        self.hooks = hooks
        self.tokens: CallTokens | None = None
        self.has_failed = self.has_returned = False
        self.thread: int | None = None

    def may_run(self) -> bool:
        """Whether layers may still run for it; its traceback may keep a call that failed or was interrupted."""
        if self.has_failed or self.has_returned or self.thread != threading.get_ident():
            return not self.has_failed
        frame = sys._getframe(1)
        while frame is not None:
            given = frame.f_locals.get("kwargs")
            if frame.f_locals.get("call") is self or isinstance(given, dict) and given.get(TOKENS) is self:
                return True
            frame = frame.f_back
        return False


class GateHook:
    """
    Forward hook of one gate: calls the override that was in force for its layer when the forward began.

    Attributes:
        hooks: of the decoder; None in a gate that was copied alone, as PEFT does for `modules_to_save`: such a gate
            behaves as without a hook.
        layer: of the gate.
    """

    def __init__(self, hooks: "RoutingHooks | None", layer: int):
        self.hooks, self.layer = hooks, layer

    def __deepcopy__(self, memo: dict) -> "GateHook":
        return GateHook(memo.get(id(self.hooks)), self.layer)  # a decoder's hooks are copied before its parts

    def __call__(self, gate: nn.Module, args: tuple, output: GateOutput) -> GateOutput | None:
        if self.hooks is None:
            return None
        # taken away, so that no later gate takes the tokens for its own
        call, current_layer.call = getattr(current_layer, "call", None), None
        if (call is None or call.hooks is not self.hooks) and not torch.compiler.is_compiling():
            call, began_without = _on_the_stack(self.hooks)
            if call is None and began_without:
                return None
        if call is None or call.hooks is not self.hooks:
            if self.layer not in self.hooks.current:
                return None
            raise UnsupportedModelError(
                f"the gate of layer {self.layer} ran, but the tokens of the model's call did not arrive there: the "
                "decoder must run as a whole and hand its keyword arguments on to each of its layers; use "
                "detach_memory(model), or disable_memory(model) around calls of single layers and around backward "
                "passes of forwards from before the memory was attached."
            )
        tokens = call.tokens
        if tokens is not None:
            tokens.routed.add(self.layer)
        override = None if tokens is None else tokens.overrides.get(self.layer)
        if override is None:
            return None
        x = args[0].reshape(-1, args[0].shape[-1])
        if tokens.shape[0] * tokens.shape[1] != len(x):
            raise UnsupportedModelError(
                f"the gate of layer {self.layer} got {len(x)} tokens of a call of {list(tokens.shape)}: an override "
                "needs all tokens of the call in their order, so switch off whatever splits or drops tokens, or use "
                "detach_memory(model)."
            )
        watch = tokens.overrides.watches.get(self.layer)
        if watch is not None:
            output = watch.checked(gate, args, output, is_step=tokens.shape[1] == 1)
        return _checked(override(x, output, tokens), output, self.layer)


def _checked(replaced: GateOutput | None, own: GateOutput, layer: int) -> GateOutput | None:
    if replaced is None:
        return None
    if isinstance(replaced, tuple) and len(replaced) == 3 and all(isinstance(one, Tensor) for one in replaced):
        logits, weights, ids = replaced
        if logits.shape == own[0].shape and weights.shape == ids.shape and len(ids) == len(logits):
            return replaced
    raise TypeError(
        f"the routing override of layer {layer} returned {shown(replaced)}: it must return None, or a tuple of logits "
        f"of shape {list(own[0].shape)}, and of expert weights and expert ids of shape [{len(own[0])}, experts]."
    )


def _on_the_stack(hooks: "RoutingHooks") -> tuple[Call | None, bool]:
    """
    The call whose layer this thread runs, found in the layer's keyword arguments: gradient checkpointing runs layers
    again without their hooks. If there is none, whether a forward of the decoder runs here that began before it had
    these hooks.
    """
    frame, began_without = sys._getframe(2), False
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            given = frame.f_locals.get("kwargs") or {}
            of_hooks = [hook for hook in list(module._forward_pre_hooks.values()) if _belongs_to(hook, hooks)]
            call = given.get(TOKENS) if isinstance(given, dict) else None
            if of_hooks and hooks not in of_hooks and call is not None and call.hooks is hooks:
                return call, False
            if hooks in of_hooks:
                if call is not None:
                    return None, False
                began_without = True
        frame = frame.f_back
    return None, began_without


def _belongs_to(hook: Callable, hooks: "RoutingHooks") -> bool:
    return hook is hooks or getattr(hook, "__self__", None) is hooks


def takes_any_keyword(module: nn.Module) -> bool:
    """Whether a part of a layer may be handed the keyword arguments of the layer."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def without_tokens(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a layer or of a part of one as the model gave them."""
    return args, {name: value for name, value in kwargs.items() if name != TOKENS}


def check_routed(tokens: CallTokens, num_layers: int) -> None:
    """Refuses a forward in which a gate with an override did not run, of the first `num_layers` layers."""
    # `num_layers` of the config, as early exit in assisted generation runs only the first layers
    if missed := [layer for layer in tokens.overrides if layer not in tokens.routed and layer < num_layers]:
        raise UnsupportedModelError(
            f"the gates of layers {shown(missed)} did not run in a forward with a routing override in force for them: "
            "a gate was replaced after attaching, or something calls its `forward` directly; use detach_memory(model) "
            "and attach again."
        )


def forget_interrupted_forward() -> None:
    """Neither gates nor output embeddings of this thread take the tokens of an interrupted forward for their own."""
    current_layer.call = None
    forget_interrupted_logits()
