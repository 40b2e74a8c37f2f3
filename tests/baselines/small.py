"""A gate's output on two tokens and four experts, small enough to work out by hand."""

import dataclasses

import torch

from knnmoe_hf.models.gates import Gate, find_gates
from tests.support.models import tiny_model

WEIGHTS = {
    "olmoe": lambda logits, chosen: _softmax(logits, range(len(logits)), chosen),
    "qwen3_moe": lambda logits, chosen: _softmax(logits, chosen, chosen),
    "gpt_oss": lambda logits, chosen: _softmax(logits, chosen, chosen),
}
"""By family, the weights of chosen experts: parts of a softmax over all experts, or over the chosen."""


def _softmax(logits, among, chosen) -> list[float]:
    powers = {at: torch.tensor(logits[at], dtype=torch.float64).exp() for at in among}
    return [float(powers[at] / sum(powers.values())) for at in chosen]


def gate_of(family: str) -> Gate:
    """A gate with the family's rule, top-2."""
    return dataclasses.replace(find_gates(tiny_model(family))[0], top_k=2)


def output_of(gate: Gate, logits: list[list[float]]) -> tuple:
    """What the gate returns for these logits."""
    logits = torch.tensor(logits)
    return logits, *gate.rule.routed(logits, 2, logits.dtype)


def check_routes(family: str, found: tuple, logits: list[list[float]], experts: list[list[int]]) -> None:
    """Two tokens get these experts, best first, with the weights that the family's rule gives them by these logits."""
    assert found[2].tolist() == experts
    expected = [WEIGHTS[family](row, chosen) for row, chosen in zip(logits, experts)]
    torch.testing.assert_close(found[1], torch.tensor(expected), atol=1e-6, rtol=1e-5)
