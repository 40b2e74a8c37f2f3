"""What the gates of a model return, without any memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.models.calls import Overrides, RoutingOverride
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import using_overrides


@contextmanager
def gate_outputs(model: nn.Module) -> Iterator[dict[int, GateOutput]]:
    """Inside this context: `{layer: what the gate returned last}`, with its gradient graph and without any memory."""
    found: dict[int, GateOutput] = {}

    def recorder(layer: int) -> RoutingOverride:
        return lambda x, output, tokens: found.update({layer: output})  # None: the gate's own output stays

    with using_overrides(model, Overrides({gate.layer: recorder(gate.layer) for gate in find_gates(model)})):
        yield found
