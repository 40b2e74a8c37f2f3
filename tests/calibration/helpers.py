"""A calibrated memory with the text that it was calibrated on, and what the memory does to the NLL of a text."""

from dataclasses import replace

from knnmoe_hf import RoutingMemory, calibrate
from knnmoe_hf.evaluation.scores import score
from tests.conftest import tiny_model
from tests.support.attaching import attached
from tests.support.domain import domain, domain_memory, own_text


def nll(model, rows) -> float:
    return score(model, rows, 8).mean_nll


def harm(model, memory, rows) -> float:
    before = nll(model, rows)
    with attached(model, memory):
        return nll(model, rows) - before


def at(memory, threshold: float) -> RoutingMemory:
    """The memory with another threshold in its stats."""
    layers = {i: replace(rows, stats=replace(rows.stats, threshold=threshold)) for i, rows in memory.layers.items()}
    return replace(memory, layers=layers)


class Case:
    """A model, a memory of the domain, background text sampled from the model, and the calibrated memory."""

    def __init__(self, family: str):
        self.model, self.memory = tiny_model(family), domain_memory(family, "calibrated")
        self.background = {"one": own_text(self.model, 24, 1), "two": own_text(self.model, 24, 2, temperature=0.8)}
        self.given = self.background | {"more of the domain": domain(16, 77)}
        self.fitted, self.found = calibrate(self.model, self.memory, self.given)
