"""How far a layer's neighbours are trusted: lambda in [0, 1], from their similarity and from the sequence so far.

`Rbf` judges each token alone. `InContext` also asks whether the sequence so far has looked like the references, in
this layer and in the layers before: similarities of single tokens overlap between text that is like the references
and text that is not, their running means hardly do.

Every formula stands here once, as arithmetic that numbers and tensors share: the lambda of one decoded token on the
CPU is computed with Python floats, which costs a tenth of what tensors of one element cost.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.sequence import Tokens

Number = float | Tensor
"""A float for one token, or a tensor (T,) float32."""

NEGLIGIBLE = 1e-3
"""`InContext` sets confidences of no more than this to 0: such tokens are routed exactly as without a memory."""

_LARGEST_RATE = 3e38
_LEAST_GAMMA = 1e-30  # a gamma of 0 would give 0 * inf = NaN for infinite distances


def rbf_rate(scale: float, gamma: float) -> float:
    """
    The rate `gamma / s` of the similarity `exp(-rate * d)`; positive, so that infinite distances give 0, and finite in
    float32, so that a distance of 0 gives 1.
    """
    return min(max(gamma, _LEAST_GAMMA) / scale, _LARGEST_RATE)


def similarity(distances: Tensor, scale: float, gamma: float) -> Tensor:
    """
    Mean RBF similarity of the neighbours, `mean_i exp(-gamma * d_i / s)`: the confidence of arXiv 2601.02144v2.

    Args:
        distances: (T, K) float32, squared L2.
        scale: s, the layer's median neighbour distance, positive.
        gamma: inverse width of the RBF, in units of `1 / s`, at least 0.

    Returns:
        (T,) float32 in [0, 1]; infinite distances count as 0.
    """
    return torch.exp(distances * -rbf_rate(scale, gamma)).mean(dim=-1)


@dataclass(frozen=True)
class CalibrationStats:
    """
    Statistics of one layer's running mean similarity, which decide how far `InContext` opens the memory.

    With `warmup` w (see `Tokens.warmup`), the running mean is expected to be `reference_mean + reference_drift * w` on
    text like the references and `background_mean + background_drift * w` on other text: the first tokens of a sequence
    look different from those that have text before them. `knnmoe_hf.calibration` fits all of it.

    Attributes:
        reference_mean, background_mean: expected running mean on held-out references and on background text.
        weight: of this layer's evidence among the layers passed so far.
        threshold, width: evidence at which the memory is half open, and how softly it opens around it.
        scale: unit of distance of the similarity.
        gamma, half_life, num_neighbors: options of the similarity and of its running mean when these were fitted.
        reference_drift, background_drift: see above.
        min_warmup: the smallest warmup that the fit has seen; below it, w counts as this.
        open_shift: by how much the references' similarity falls in this layer once the memory is open in the layers
            before it, whose changed routing moves this layer's inputs.
        background_open_shift: the same of background text, whose similarity falls less.
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
    background_open_shift: float = 0.0

    def differs(self, options: RetrievalOptions) -> str | None:
        """Names an option that has changed since the fit, which makes these statistics useless; None if none has."""
        for name in ("gamma", "half_life", "num_neighbors"):
            if getattr(self, name) != getattr(options, name):
                return f"{name}={getattr(self, name):g}, not {getattr(options, name):g}"
        return None

    def evidence(self, mean: Number, warmup: Number) -> Number:
        """Where a running mean similarity lies between background text (0) and the references (1)."""
        warmup = _at_least(self.min_warmup, warmup)
        background = self.background_mean + self.background_drift * warmup
        gap = (self.reference_mean - self.background_mean) + (self.reference_drift - self.background_drift) * warmup
        return (mean - background) / gap

    def shift(self, before: "Evidence") -> Number:
        """
        By how much the similarity has fallen in this layer, as far as the memory is open in the layers before.

        The more those layers take the text for references, the further it has fallen. With the references' own shift
        for all text, text that is a little like the references would look ever more like them in later layers.
        """
        likeness = _within_one(before.evidence / before.weight) if before.weight else 0.0
        fallen = self.background_open_shift + (self.open_shift - self.background_open_shift) * likeness
        return before.opening * fallen

    def opening(self, evidence: Number, weight: float = 1.0) -> Number:
        """How far the memory opens, in [0, 1], for evidence that was summed with weights of this total."""
        return _sigmoid((evidence - self.threshold * weight) / (self.width * weight))

    def accumulated(self, before: "Evidence", mean: Number, warmup: Number) -> "Evidence":
        """The evidence of the layers so far, this one included, and how far the memory opens in this layer."""
        evidence = before.evidence + self.weight * self.evidence(mean, warmup)
        weight = before.weight + self.weight
        return Evidence(evidence, weight, self.opening(evidence, weight))


class Evidence(NamedTuple):
    """What a layer leaves for the layers after it: evidence and weight summed so far, and its own opening."""

    evidence: Number = 0.0
    weight: float = 0.0
    opening: Number = 0.0


class Confidence(ABC):
    """
    How far a layer's neighbours are trusted.

    Args:
        scale, gamma: unit and inverse width of the similarity.
    """

    def __init__(self, scale: float, gamma: float):
        self.scale, self.gamma = scale, gamma

    def similarity(self, distances: Tensor) -> Tensor:
        """(T,) float32 of distances (T, K), see `similarity`."""
        return similarity(distances, self.scale, self.gamma)

    @abstractmethod
    def __call__(self, similar: Number, tokens: Tokens) -> Number:
        """Lambda in [0, 1] for the similarity of each token (T,), or of a single one."""


class Rbf(Confidence):
    """The paper's: the similarity itself."""

    def __call__(self, similar: Number, tokens: Tokens) -> Number:
        return similar


class InContext(Confidence):
    """
    Similarity, as far as the sequence so far has looked like the references.

    The evidence of a layer is where the running mean similarity lies between background text and the references. The
    weighted mean of the evidence of the memory's layers up to this one decides how far the memory opens. What enters
    the running mean is the similarity as it would be with the memory closed in the layers before. Otherwise the
    references, on which the memory is open, would look less like references than other text, on which it is closed.

    Args:
        layer: index of the decoder layer.
        stats: of this layer.
        previous_layer: the memory's layer before this one; None for its first.
    """

    def __init__(self, layer: int, stats: CalibrationStats, previous_layer: int | None):
        super().__init__(stats.scale, stats.gamma)
        self.layer, self.stats, self.previous_layer = layer, stats, previous_layer

    def __call__(self, similar: Number, tokens: Tokens) -> Number:
        stats, before = self.stats, tokens.layer_evidence.get(self.previous_layer, Evidence())
        before = Evidence(_like(similar, before.evidence), before.weight, _like(similar, before.opening))
        mean = tokens.running_mean(self.layer, similar + stats.shift(before), stats.half_life)
        found = stats.accumulated(before, mean, tokens.warmup(stats.half_life, like=similar))
        tokens.layer_evidence[self.layer] = found
        return _without_negligible(similar * found.opening)

    def reopened(self, similar: Number, tokens: Tokens, threshold: float, width: float) -> Number:
        """
        What the confidence of this call would be with another threshold and width of this layer's opening.

        Args:
            similar, tokens: of the call, which has been made.
            threshold, width: as those of `CalibrationStats`.
        """
        found = tokens.layer_evidence[self.layer]
        return reopened(similar, found.evidence / found.weight, threshold, width)


def reopened(similar: Number, evidence: Number, threshold: float, width: float) -> Number:
    """The confidence for a similarity and a layer's mean evidence, if it opens at this threshold."""
    return _without_negligible(similar * _sigmoid((evidence - threshold) / width))


def _like(similar: Number, value: Number) -> Number:
    """A value of an earlier layer as this layer computes: as a float, or on its device (devices may differ)."""
    if isinstance(similar, float):
        return float(value)
    return value.to(similar.device) if isinstance(value, Tensor) else value


def _at_least(floor: float, x: Number) -> Number:
    return x.clamp_min(floor) if isinstance(x, Tensor) else max(x, floor)


def _within_one(x: Number) -> Number:
    return x.clamp(0.0, 1.0) if isinstance(x, Tensor) else min(max(x, 0.0), 1.0)


def _sigmoid(x: Number) -> Number:
    if isinstance(x, Tensor):
        return torch.sigmoid(x)
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0  # exp(700) is about the largest float


def _without_negligible(x: Number) -> Number:
    if isinstance(x, Tensor):
        return F.threshold(x, NEGLIGIBLE, 0.0)
    return x if x > NEGLIGIBLE else 0.0
