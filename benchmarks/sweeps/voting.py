"""Ways in which the neighbours of a token may vote for the next one, on observations of a memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256  # tokens whose neighbours are compared with each other at once


@dataclass(frozen=True)
class Seen:
    """
    What is known of n tokens of a text, all float32 unless said otherwise.

    Attributes:
        target: (n,) int64, the next token.
        own: (n,) the model's log-probability of it.
        largest, entropy: (n,) largest probability of the model, and the entropy in nats.
        confidence: (n,) of the last remembered layer.
        distances: (n, K) to the neighbours of that layer, nearest first, in units of its scale.
        tokens: (n, K) int64, the tokens that followed them.
        before: the same two of the layer before.
    """

    target: Tensor
    own: Tensor
    largest: Tensor
    entropy: Tensor
    confidence: Tensor
    distances: Tensor
    tokens: Tensor
    before: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Votes:
    """
    The recalled distribution.

    Attributes:
        weights: (n, K) of the neighbours.
        masses: (n, K) of each one's token.
        target: (n,) mass of the true next token.
    """

    weights: Tensor
    masses: Tensor
    target: Tensor

    @classmethod
    def of(cls, distances: Tensor, tokens: Tensor, target: Tensor, neighbors: int, temperature: float) -> "Votes":
        """Of the first `neighbors`, `softmax(-d / temperature)`."""
        distances, tokens = distances[:, :neighbors], tokens[:, :neighbors]
        weights = torch.softmax(-distances / temperature, dim=-1)
        masses = torch.cat(
            [
                (weight[:, None] * (ids[:, None] == ids[:, :, None])).sum(-1)
                for weight, ids in zip(weights.split(_BLOCK), tokens.split(_BLOCK))
            ]
        )
        return cls(weights, masses, (weights * (tokens == target[:, None])).sum(-1))

    @property
    def entropy(self) -> Tensor:
        """(n,), in nats."""
        return -(self.weights * self.masses.clamp_min(1e-9).log()).sum(-1)


Strength = Callable[[Seen, Votes], Tensor]  # (n,) in [0, 1], before m


def linear(strength: Tensor, m: float) -> Tensor:
    """m times the strength."""
    return m * strength


def odds(strength: Tensor, m: float) -> Tensor:
    """The weight whose odds are those of m times those of the strength."""
    ratio = m / (1 - m) * strength / (1 - strength).clamp_min(1e-6)
    return ratio / (1 + ratio)


def _nearest(power: float) -> Strength:
    return lambda seen, votes: seen.confidence * (-power * seen.distances[:, 0]).exp()


def _agreeing(power: float) -> Strength:
    return lambda seen, votes: seen.confidence * (-power * votes.entropy).exp()


def both_of(seen: Seen, votes: Votes) -> Tensor:
    """Agreement and nearness: the confidence times `exp(-(H + d_1) / 2)`."""
    return seen.confidence * (-0.5 * (votes.entropy + seen.distances[:, 0])).exp()


def _relative(seen: Seen, votes: Votes) -> Tensor:
    return seen.confidence * (1 - votes.entropy / torch.tensor(float(votes.weights.shape[1])).log())


def _unsure(seen: Seen, votes: Votes) -> Tensor:
    return both_of(seen, votes) * (1 - seen.largest)


def _undecided(seen: Seen, votes: Votes) -> Tensor:
    return both_of(seen, votes) * seen.entropy / (1 + seen.entropy)


RULES: dict[str, tuple[Callable[[Tensor, float], Tensor], Strength]] = {
    "constant weight": (linear, lambda seen, votes: seen.confidence),
    "constant weight, without a confidence": (linear, lambda seen, votes: torch.ones_like(seen.confidence)),
    "constant weight, as odds": (odds, lambda seen, votes: seen.confidence),
    "agreement: 1 - H / ln K": (odds, _relative),
    "agreement: exp(-H / 2)": (odds, _agreeing(0.5)),
    "agreement: exp(-H)": (odds, _agreeing(1.0)),
    "agreement: largest mass": (odds, lambda seen, votes: seen.confidence * votes.masses.amax(-1)),
    "nearness: exp(-d_1 / 2)": (odds, _nearest(0.5)),
    "nearness: exp(-d_1)": (odds, _nearest(1.0)),
    "agreement and nearness": (odds, both_of),
    "agreement and nearness, linear": (linear, both_of),
    "agreement and nearness, times 1 - the model's largest probability": (odds, _unsure),
    "agreement and nearness, times H / (1 + H) of the model": (odds, _undecided),
}
"""Ways to weigh the recalled distribution; the last ones ask the model too."""
