"""
The tokens that followed a token's neighbours, as a distribution of the next token.

kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172) gives the next token y the probability
`(1 - m) p_model(y) + m sum_i v_i [y = y_i]`, where y_i followed the i-th nearest reference token. Here m is multiplied
by the memory's confidence c, so that text unlike the references keeps the model's own distribution.

Here and in `knnmoe_hf.calibration`, the voters are the neighbours that take part, a vote is the weight v_i of one of
them, the recalled distribution is that of their tokens, each with the sum of its votes, and the mixing weight is the
share of that distribution in the result. `knnmoe_hf.lookup.logits` mixes it with the model's.

Tensors only: T tokens, K neighbours, N rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.lookup.mixing import BELOW_ONE, TINY, neighbor_weights
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.parts import by_rows
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.search.base import Neighbors

DEFAULT_WEIGHT, DEFAULT_TEMPERATURE, DEFAULT_NEIGHBORS = 0.35, 0.25, 64
"""Where nothing was fitted."""


@dataclass(frozen=True)
class Voting:
    """
    How the neighbours of a memory's last layer vote for the next token.

    Attributes:
        next_tokens: (N,) int32, the token that follows each row, on the layer's device.
        weight: m, from 0 to below 1.
        temperature: of the votes `softmax(-d / (temperature * s))`, positive.
        num_voters: how many neighbours vote.
        fit: of a calibration, if the mixing weight is as that says; None if it is `m c`.
    """

    next_tokens: Tensor
    weight: float
    temperature: float
    num_voters: int
    fit: RecallFit | None = None

    @classmethod
    def of(cls, next_tokens: Tensor, options: RetrievalOptions, fit: RecallFit | None = None) -> "Voting":
        """With the options' values; where they name none, with those of the fit, or the defaults without one."""
        weight, temperature = DEFAULT_WEIGHT, DEFAULT_TEMPERATURE
        if fit is not None:
            weight, temperature = fit.next_token_weight, fit.next_token_temperature
        if options.next_token_weight is not None:
            weight, fit = float(options.next_token_weight), None
        if options.next_token_temperature is not None:
            temperature = float(options.next_token_temperature)
        weight = min(weight, BELOW_ONE)  # float32 would round a larger one to 1, whose log odds are infinite
        return cls(next_tokens, weight, temperature, num_voters_of(options), fit)

    def mixing_weight(self, confidence: Tensor, trust: Tensor) -> Tensor:
        """
        The mixing weight of each token: `m c`, or `fitted_weight` if there is a fit.

        Args:
            confidence: (T,) float32 in [0, 1], c.
            trust: (T,) float32 in [0, 1], see `trust`.

        Returns:
            (T,) float32 in [0, 1).
        """
        return self.weight * confidence if self.fit is None else fitted_weight(self.weight, confidence * trust)


def num_voters_of(options: RetrievalOptions) -> int:
    """How many neighbours vote."""
    return options.next_token_neighbors or DEFAULT_NEIGHBORS


def trust(votes: Tensor, probabilities: Tensor, nearest: Tensor) -> Tensor:
    """
    How far neighbours can be trusted to know the next token: `g = exp(-(H + d_1) / 2)`, with the entropy H of the
    recalled distribution in nats, which says how far they agree, and the distance d_1 of the nearest.

    Weights that depend on the neighbours are those of later kNN-LMs (He et al. 2021, arXiv 2109.04212; Drozdov et al.
    2022, arXiv 2210.15859); this form was found on held-out text (benchmarks/results).

    Args:
        votes: (T, K) float32; rows sum to 1.
        probabilities: (T, K) float32, of each neighbour's token, see `summed_by_token`.
        nearest: (T,) float32, squared L2 distance of the nearest, in units of the layer's scale.

    Returns:
        (T,) float32 in [0, 1]; 1 for neighbours that agree, the nearest of which is the query itself.
    """
    entropy = -(votes * probabilities.clamp_min(TINY).log()).sum(dim=-1)
    return torch.exp((entropy + nearest) * -0.5).clamp_max(1.0)


def fitted_weight(weight: float, trusted: Tensor) -> Tensor:
    """
    The mixing weight with log odds `logit(m) + logit(c g)`: `c g` itself for m = 0.5, more for a larger m.

    Args:
        weight: m, from 0 to below 1.
        trusted: (T,) float32 in [0, 1], `c g`: confidence times trust. Where it is 0, so is the mixing weight.

    Returns:
        (T,) float32 in [0, 1).
    """
    recalled, own = weight * trusted, (1 - weight) * (1 - trusted)
    return (recalled / (recalled + own).clamp_min(TINY)).clamp_max(BELOW_ONE)


class RecalledTokens(NamedTuple):
    """
    What the last layer with rows leaves for the output embeddings. Nothing is computed until it is known for which
    tokens logits are wanted.

    Attributes:
        voting: how the neighbours vote.
        voters: distances and rows of the neighbours that do, (T, K) each.
        confidence: c, (T,) float32, or a float for a single token.
        scale: s, the unit of distance of the layer.
    """

    voting: Voting
    voters: Neighbors
    confidence: Tensor | float
    scale: float

    def at(self, places: Tensor) -> "RecalledTokens":
        """Those of some of the tokens, by index (T',)."""
        distances, rows = self.voters
        places, confidence = places.to(rows.device), self.confidence
        if isinstance(confidence, Tensor):
            confidence = confidence.index_select(0, places)
        voters = Neighbors(distances.index_select(0, places), rows.index_select(0, places))
        return self._replace(voters=voters, confidence=confidence)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.voters.rows)

    @property
    def confidences(self) -> Tensor:
        """The confidence of each token, (T,) float32, on the device of the voters."""
        device = self.voters.rows.device
        return torch.as_tensor(self.confidence, dtype=torch.float32, device=device).expand(self.tokens)

    def distribution(self) -> tuple[Tensor, Tensor, Tensor]:
        """
        The recalled distribution, and how far it can be trusted.

        Returns:
            The voters' tokens (T, K) int64, the probability of each (T, K) float32, equal for equal tokens, and
            `trust` (T,) float32.
        """
        distances, rows = self.voters
        ids = self.voting.next_tokens[rows].long()
        votes = neighbor_weights(distances, self.scale, self.voting.temperature)
        probabilities = summed_by_token(ids, votes)
        return ids, probabilities, trust(votes, probabilities, distances[:, 0] / self.scale)

    def weighted(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and probabilities as in `distribution`, and the mixing weight (T,) float32, on a device."""
        ids, probabilities, trusts = self.distribution()
        weight = self.voting.mixing_weight(self.confidences, trusts)
        return ids.to(device), probabilities.to(device), weight.to(device).detach()


def summed_by_token(ids: Tensor, votes: Tensor) -> Tensor:
    """The probability of each of ids (T, K) in the recalled distribution: the sum of the votes (T, K) for it."""
    return by_rows(_sum_of_equals, ids.shape[1] ** 2, ids, votes)


def _sum_of_equals(ids: Tensor, votes: Tensor) -> Tensor:
    return torch.where(ids[:, :, None] == ids[:, None, :], votes[:, None, :], 0.0).sum(-1)
