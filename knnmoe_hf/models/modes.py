"""Context managers that put a model into eval mode or freeze its weights, and restore its state at the end."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context `model` is in eval mode; at the end every module's training flag is restored."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def called_unquantised(model: nn.Module) -> Iterator[None]:
    """Inside this context a quantised model says it is none: Trainer would not train one, and a build trains none."""
    quantised = getattr(model, "is_quantized", False)
    if quantised:
        model.is_quantized = False
    try:
        yield
    finally:
        if quantised:
            model.is_quantized = True


@contextmanager
def frozen(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """
    Inside this context no weight gets a gradient and no dropout is active; at the end both are as before.

    Args:
        model: any transformers model.
        checkpointing: whether layers with gradient checkpointing enabled use it.
    """
    # by name: a weight that accelerate offloads is another tensor after each forward
    trainable = {name for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}
    model.requires_grad_(False)
    try:
        with evaluating(model):
            # a layer checkpoints only in training mode; its submodules, dropout among them, stay in eval mode
            if checkpointing:
                for module in model.modules():
                    if isinstance(module, GradientCheckpointingLayer):
                        module.training = True
            yield
    finally:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in trainable:
                parameter.requires_grad_(True)
