"""Counting a model's passes and timing them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knnmoe_hf.models.probe import is_probing


@dataclass
class Passes:
    """
    What was counted, so far.

    Attributes:
        forward: passes of one example forward through all layers.
        backward: passes of one example's gradient back through the layers.
        tokens: that the forward passes read, padding included.
        seconds: wall time of the context.
    """

    forward: int = 0
    backward: int = 0
    tokens: int = 0
    seconds: float = 0.0


@contextmanager
def counted(model: nn.Module, tell: Callable[[Passes], object] | None = None) -> Iterator[Passes]:
    """
    Counts the passes inside this context, and its seconds when it ends; the test forwards of attaching do not count.

    Args:
        model: of transformers; calls of the model and of the stack of layers inside it both count once.
        tell: called with what was counted so far, after each forward pass.
    """
    passes, stack = Passes(), getattr(model, "base_model", model)
    seen: list[tuple[int, int]] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        given = ids if ids is not None else kwargs["inputs_embeds"]
        seen.append((given.shape[0], given.shape[1]))

    def after(module: nn.Module, args: tuple, output) -> None:
        examples, length = seen.pop()
        if is_probing():
            return
        passes.forward += examples
        passes.tokens += examples * length
        if tell is not None:
            tell(passes)
        hidden = output[0]
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda gradient: back(examples))

    def back(examples: int) -> None:
        if handles:
            passes.backward += examples

    handles = [stack.register_forward_pre_hook(before, with_kwargs=True), stack.register_forward_hook(after)]
    wait(model)
    started = time.perf_counter()
    try:
        yield passes
    finally:
        wait(model)
        passes.seconds = time.perf_counter() - started
        while handles:
            handles.pop().remove()


def wait(model: nn.Module) -> None:
    """Returns when the model's device has done all that it was given, which a clock must wait for."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
