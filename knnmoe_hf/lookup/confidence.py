"""How far one layer's neighbours are trusted: interchangeable functions from their distances to a confidence.

The first looks at a token alone. The others look at what its sequence has been like, in this layer and in those
before it: similarities of single tokens overlap between text that is like the references and text that is not, their
running means hardly do.
"""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from knnmoe_hf.lookup import mixing
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.sequence import Tokens


@dataclass(frozen=True)
class CalibrationStats:
    """
    Of the running similarity that `confidence="calibrated"` looks at, fitted by `knnmoe_hf.calibration`.

    Attributes:
        own: what it is on held-out references.
        ordinary: what it is on ordinary text.
        weight: of this layer among those passed.
        threshold, width: where the memory opens and how softly, on the way from `ordinary` (0) to `own` (1).
        scale: the unit of distance of the similarity.
        gamma, half_life, num_neighbors: the options of the similarity and its mean.
        reference_drift, background_drift: what the first two have on top where a sequence begins; of it, half is left after
            each half-life, as a model's first tokens are unlike those that have text before them.
        min_warmup: the least `warmup` that the stats were fitted on; beyond, they stay what they are there.
        fall: by how much less similar the references look to this layer once the memory is open in those before it,
            whose changed routing moves its inputs.
    """

    reference_mean: float
    background_mean: float
    weight: float
    threshold: float
    width: float
    scale: float
    gamma: float
    half_life: float
    num_neighbors: float
    reference_drift: float = 0.0
    background_drift: float = 0.0
    min_warmup: float = 0.0
    open_shift: float = 0.0

    def differs(self, config: RetrievalOptions) -> str | None:
        """An option that is not as when these stats were fitted, so that they say nothing; None if all are."""
        for name in ("gamma", "half_life", "num_neighbors"):
            if getattr(self, name) != getattr(config, name):
                return f"{name}={getattr(self, name):g}, not {getattr(config, name):g}"
        return None

    def opening(self, evidence: Tensor, weight: float = 1.0) -> Tensor:
        """How far the memory opens, in [0, 1], for the evidence of the layers so far, summed up by these weights."""
        return torch.sigmoid((evidence - self.threshold * weight) / (self.width * weight))

    def evidence(self, mean: Tensor, warmup: Tensor) -> Tensor:
        """
        Where a running similarity lies between what it is on ordinary text (0) and on the references (1).

        Args:
            mean: (T,) float32, the running similarity.
            warmup: (T,) float32, see `knnmoe_hf.sequence.Tokens.warmup`.
        """
        warmup = warmup.clamp_min(self.min_warmup)
        above = torch.add(mean - self.background_mean, warmup, alpha=-self.background_drift)
        return above / (
            warmup * (self.reference_drift - self.background_drift) + (self.reference_mean - self.background_mean)
        )

    def evidence_of_one(self, mean: float, warmup: float) -> float:
        """The same of a single token."""
        warmup = max(warmup, self.min_warmup)
        above = mean - self.background_mean - self.background_drift * warmup
        return above / (
            warmup * (self.reference_drift - self.background_drift) + (self.reference_mean - self.background_mean)
        )

    def opening_of_one(self, evidence: float) -> float:
        """The same as `opening` of a single token."""
        beyond = (self.threshold - evidence) / self.width
        return 1 / (1 + math.exp(beyond)) if beyond < 700 else 0.0


logger = logging.getLogger(__name__)


class Confidence(ABC):
    """
    How far a layer's neighbours are trusted.

    Attributes:
        falloff: see `OfSimilarity`; None for all others.
    """

    falloff: float | None = None

    @abstractmethod
    def __call__(self, distances: Tensor, tokens: Tokens) -> Tensor:
        """From the neighbours' distances (T, K) and what is known of the tokens to lambda (T,) float32 in [0, 1]."""


class OfSimilarity(Confidence):
    """
    A confidence that hangs on nothing but the neighbours' mean similarity.

    Attributes:
        falloff: of that similarity, `exp(-falloff * distance)`.
    """

    falloff: float

    @abstractmethod
    def of_one(self, similar: float, tokens: Tokens) -> float:
        """The same where there is but one token, on the CPU, whose neighbours are so similar in the mean."""


class Rbf(OfSimilarity):
    """The paper's: mean similarity to the neighbours."""

    def __init__(self, scale: float, gamma: float):
        self.scale, self.gamma, self.falloff = scale, gamma, mixing.falloff(scale, gamma)

    def __call__(self, distances: Tensor, tokens: Tokens) -> Tensor:
        """See `mixing.similarity`."""
        return mixing.similarity(distances, self.scale, self.gamma)

    def of_one(self, similar: float, tokens: Tokens) -> float:
        return similar


class InContext(OfSimilarity):
    """
    Similarity, as far as the sequence so far has been like the references.

    A layer's evidence is where the running mean of the similarity lies between what it would be on ordinary text and
    on the references after as many tokens; the weighted mean of it over the memory's layers up to this one decides.
    The similarity that is averaged is what it would be were the memory closed in the layers before: else text on which
    it is closed would look more like the references than the references do, on which it is open.

    Args:
        layer: index of the decoder layer.
        stats: of this layer.
        before: the same of the memory's layer before this one.
    """

    def __init__(self, layer: int, stats: CalibrationStats, before: "InContext | None"):
        self.layer, self.stats, self.falloff = layer, stats, mixing.falloff(stats.scale, stats.gamma)
        self.before = before.layer if before is not None else None
        self.weight = stats.weight + (before.weight if before is not None else 0.0)  # of all layers so far

    def __call__(self, distances: Tensor, tokens: Tokens) -> Tensor:
        """See `mixing.gated`."""
        stats, passed, weight = self.stats, tokens.shared.get(self.before), self.stats.weight
        undisturbed = similar = mixing.similarity(distances, stats.scale, stats.gamma)
        if passed is not None:
            evidence, opened = (torch.as_tensor(part, device=similar.device) for part in passed)
            undisturbed = torch.add(similar, opened, alpha=stats.open_shift)
        mean = tokens.running_mean(self.layer, undisturbed, stats.half_life)
        found = stats.evidence(mean, tokens.warmup(stats.half_life, mean.device))
        if passed is None:
            evidence = found * weight
        else:
            evidence, weight = torch.add(evidence, found, alpha=weight), self.weight
        opening = stats.opening(evidence, weight)
        tokens.shared[self.layer] = evidence, opening
        return mixing.gated(similar, opening)

    def of_one(self, similar: float, tokens: Tokens) -> float:
        stats, passed, weight = self.stats, tokens.shared.get(self.before), self.stats.weight
        evidence, undisturbed = 0.0, similar
        if passed is not None:
            evidence, opened = map(float, passed)
            undisturbed, weight = similar + stats.open_shift * opened, self.weight
        mean, warmup = tokens.running_mean_of_one(self.layer, undisturbed, stats.half_life)
        evidence += stats.weight * stats.evidence_of_one(mean, warmup)
        opening = stats.opening_of_one(evidence / weight)
        tokens.shared[self.layer] = evidence, opening
        return lam if (lam := similar * opening) > mixing.NEGLIGIBLE else 0.0
