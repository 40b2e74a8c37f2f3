"""
Fits the mixing weight of recalled next tokens, within bounds of harm.

Nothing here runs the model: how the NLL of each target changes follows from the votes and from the probability that
the model gives it, exactly where the routing stays the model's (`recall="next_tokens"`), and nearly where the memory
changes it too (`"both"`), whose gain and harm are therefore measured afterwards.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from knnmoe_hf.calibration.observe import Observation
from knnmoe_hf.calibration.votes import TEMPERATURES
from knnmoe_hf.lookup.confidence import reopened
from knnmoe_hf.lookup.next_tokens import DEFAULT_TEMPERATURE, fitted_weight
from knnmoe_hf.lookup.recall_fit import RecallFit

# chosen on held-out text, see benchmarks/results/next_tokens.md
_WIDTH = 0.2  # of the opening
_THRESHOLDS = [round(0.1 * step, 1) for step in range(2, 13)] + [1.5, 2.0]
_WEIGHTS = [round(0.05 * step, 2) for step in range(1, 16)]  # more than 0.75 harms text unlike any that was read
_ENOUGH = 0.93  # of the most gain: the rest costs more elsewhere than it is worth

Bounds = tuple[float, float]
"""By how much the NLL of background text may rise, in nats per token: in the mean of its kinds, and on any kind."""


@dataclass(frozen=True)
class Seen:
    """
    What is known of n target tokens.

    Attributes:
        observation: with votes.
        evidence: (n,), of the last layer, see `knnmoe_hf.lookup.confidence.InContext`.
        opening: (n,), how far the memory's routing opens, in [0, 1]; 0 if it changes none.
    """

    observation: Observation
    evidence: Tensor
    opening: Tensor | float

    def trusted(self, threshold: float, temperature: float) -> Tensor:
        """(n,), confidence times trust: the argument of `knnmoe_hf.lookup.next_tokens.fitted_weight`."""
        votes = self.observation.votes
        return reopened(votes.similar, self.evidence, threshold, _WIDTH) * votes.trusts[temperature]

    def rise(self, weight: Tensor | float, temperature: float) -> float:
        """By how much the mean NLL rises with a mixing weight (n,), in nats per token."""
        seen, nll = self.observation, self.observation.nll
        own, recalled = (nll + seen.changes(self.opening)).neg().exp(), seen.votes.recalled[temperature]
        mixed = own + weight * (recalled - own)
        return -(mixed.clamp_min(torch.finfo(torch.float32).tiny).log() + nll).mean().item()


def fit_next_tokens(
    references: Seen,
    background: Mapping[str, Seen],
    num_voters: int,
    bounds: Bounds,
    routing_harm: Mapping[str, float] | None = None,
) -> RecallFit:
    """
    Of all fits within the bounds that gain nearly the most, the one that puts least weight on background text.

    That is the mean square of the mixing weight, which tells more of the harm on other text than the harm on this text
    does. A fit of weight 0, which changes nothing, is always among them.

    Args:
        references: held-out references.
        background: background text by kind.
        num_voters: how many neighbours voted.
        bounds: of the harm.
        routing_harm: what the memory's routing was measured to cost on each kind, if it changes any: the harm of a fit
            is this, and what recalled tokens are expected to add.
    """
    expected = {kind: seen.rise(0.0, DEFAULT_TEMPERATURE) for kind, seen in background.items()}  # of routing alone
    measured = routing_harm or expected
    gain = -references.rise(0.0, DEFAULT_TEMPERATURE)
    none = RecallFit(1.0, _WIDTH, 0.0, DEFAULT_TEMPERATURE, num_voters, gain, measured)
    tried = [(0.0, none)]
    for threshold, temperature in itertools.product(_THRESHOLDS, TEMPERATURES):
        of_references = references.trusted(threshold, temperature)
        of_kinds = {kind: seen.trusted(threshold, temperature) for kind, seen in background.items()}
        for m in _WEIGHTS:
            weights = {kind: fitted_weight(m, trusted) for kind, trusted in of_kinds.items()}
            rises = {kind: seen.rise(weights[kind], temperature) for kind, seen in background.items()}
            harm = {kind: measured[kind] + rises[kind] - expected[kind] for kind in background}
            if within(harm, bounds):
                gain = -references.rise(fitted_weight(m, of_references), temperature)
                square = sum(weight.square().mean().item() for weight in weights.values())
                tried.append((square, RecallFit(threshold, _WIDTH, m, temperature, num_voters, gain, harm)))
    most = max(fit.gain for _, fit in tried)
    enough = none.gain + _ENOUGH * (most - none.gain)
    return min((pair for pair in tried if pair[1].gain >= enough), key=lambda pair: pair[0])[1]


def within(harm: Mapping[str, float], bounds: Bounds) -> bool:
    """Whether the harm is within the bounds; in the mean, a kind of text whose NLL falls counts as 0."""
    mean, worst = bounds
    return max(harm.values()) <= worst and sum(max(found, 0.0) for found in harm.values()) <= mean * len(harm)
