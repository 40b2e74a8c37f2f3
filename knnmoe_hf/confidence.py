"""How far one layer's neighbours are trusted: interchangeable functions from their distances to a confidence.

The first looks at a token alone. The others look at what its sequence has been like, in this layer and in those
before it: similarities of single tokens overlap between text that is like the references and text that is not, their
running means hardly do.
"""

import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from knnmoe_hf import mixing
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.memory.rows import LayerRows, Levels
from knnmoe_hf.sequence import Tokens

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


def make_confidences(layers: dict[int, LayerRows], config: KNNMoEConfig) -> dict[int, Confidence]:
    """
    The confidence that `config` names, for each layer of a memory in the order of the model's layers.

    `"calibrated"` takes its constants from the memory; one that holds none, or was calibrated for other options,
    falls back to `"context"`, with a warning.
    """
    if config.confidence == "rbf":
        return {layer: Rbf(rows.scale, config.gamma) for layer, rows in layers.items()}
    obstacle = _obstacle(layers, config) if config.confidence == "calibrated" else None
    if obstacle is not None:
        logger.warning(
            "%s: confidence='calibrated' falls back to 'context'; knnmoe_hf.calibrate fits it to ordinary text",
            obstacle,
        )
    fitted, made, before = config.confidence == "calibrated" and obstacle is None, {}, None
    for layer, rows in sorted(layers.items()):
        levels = rows.levels if fitted else reference_levels(rows, config)
        made[layer] = before = InContext(layer, levels, before)
    return made


def _obstacle(layers: dict[int, LayerRows], config: KNNMoEConfig) -> str | None:
    for rows in layers.values():
        if rows.levels is None:
            return "the memory holds no calibration"
        if (difference := rows.levels.differs(config)) is not None:
            return f"the memory was calibrated for {difference}"
    return None


def reference_levels(rows: LayerRows, config: KNNMoEConfig) -> Levels:
    """What `"context"` compares with: the references' mean similarity to rows of other examples."""
    own = mixing.similarity(rows.distances, rows.scale, config.gamma).mean().item() if len(rows.distances) else 1.0
    return Levels(
        own=max(own, 1e-6),
        ordinary=0.0,
        weight=1.0,
        threshold=float(config.context_threshold),
        width=float(config.context_width),
        scale=rows.scale,
        gamma=float(config.gamma),
        half_life=float(config.half_life),
        num_neighbors=float(config.num_neighbors),
    )


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
        levels: of this layer.
        before: the same of the memory's layer before this one.
    """

    def __init__(self, layer: int, levels: Levels, before: "InContext | None"):
        self.layer, self.levels, self.falloff = layer, levels, mixing.falloff(levels.scale, levels.gamma)
        self.before = before.layer if before is not None else None
        self.weight = levels.weight + (before.weight if before is not None else 0.0)  # of all layers so far

    def __call__(self, distances: Tensor, tokens: Tokens) -> Tensor:
        """See `mixing.gated`."""
        levels, passed, weight = self.levels, tokens.shared.get(self.before), self.levels.weight
        undisturbed = similar = mixing.similarity(distances, levels.scale, levels.gamma)
        if passed is not None:
            evidence, opened = (torch.as_tensor(part, device=similar.device) for part in passed)
            undisturbed = torch.add(similar, opened, alpha=levels.fall)
        mean = tokens.running_mean(self.layer, undisturbed, levels.half_life)
        found = levels.evidence(mean, tokens.unseen(levels.half_life, mean.device))
        if passed is None:
            evidence = found * weight
        else:
            evidence, weight = torch.add(evidence, found, alpha=weight), self.weight
        opening = levels.opening(evidence, weight)
        tokens.shared[self.layer] = evidence, opening
        return mixing.gated(similar, opening)

    def of_one(self, similar: float, tokens: Tokens) -> float:
        levels, passed, weight = self.levels, tokens.shared.get(self.before), self.levels.weight
        evidence, undisturbed = 0.0, similar
        if passed is not None:
            evidence, opened = map(float, passed)
            undisturbed, weight = similar + levels.fall * opened, self.weight
        mean, unseen = tokens.running_mean_of_one(self.layer, undisturbed, levels.half_life)
        evidence += levels.weight * levels.evidence_of_one(mean, unseen)
        opening = levels.opening_of_one(evidence / weight)
        tokens.shared[self.layer] = evidence, opening
        return lam if (lam := similar * opening) > mixing.NEGLIGIBLE else 0.0
