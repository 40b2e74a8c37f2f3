"""Modes of a model that end as they began: evaluation, and the frozen state in which memories are built."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode; afterwards every module's training flag is as before."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def frozen(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """
    Inside, no weight takes a gradient and nothing is random; afterwards all is as before.

    Args:
        model: any model of transformers.
        checkpointing: let its layers checkpoint their activations, if that is enabled.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            if checkpointing:  # layers look at their own flag alone; what is random inside of them stays off
                for module in model.modules():
                    if isinstance(module, GradientCheckpointingLayer):
                        module.training = True
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
