"""Gates that are trained on purpose while a memory is attached: the memory stays in force, and it is said once."""

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)


def is_being_trained(gate: nn.Module) -> bool:
    """Whether this forward is one from which the gate's own weights get gradients."""
    return gate.training and torch.is_grad_enabled() and any(weight.requires_grad for weight in gate.parameters())


class TrainedGates:
    """The layers whose gates were trained since a memory was attached."""

    def __init__(self):
        self._layers: set[int] = set()

    def add(self, layer: int) -> None:
        """Adds a layer; the first one is logged."""
        if not self._layers:
            logger.warning(
                "the gates are trained while a memory is attached (that of layer %d changed first), and "
                "the memory's rows belong to the gates as they were when it was built: freeze the gates, or build the "
                "memory anew for the trained model",
                layer,
            )
        self._layers.add(layer)
