"""Fits what a layer's running mean similarity is on text like the references and on background text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from knnmoe_hf.calibration.observe import Observation
from knnmoe_hf.lookup.confidence import CalibrationStats, Evidence
from knnmoe_hf.models.attach import AttachedMemory

_RIDGE = 1e-3  # ridge strength, in units of tokens; Var(warmup) of 256-token windows is about 0.05
_LEAST_GAP = 0.02  # between references and background of a layer that does not tell them apart, relative


def fit_stats(
    references: Observation, kinds: Sequence[Observation], prepared: AttachedMemory
) -> dict[int, CalibrationStats]:
    """
    By layer, between the references and the kind of background text that looks most like them.

    Threshold and width are not fitted here: they are 0 and 1.
    """
    stats = {}
    options = {name: float(getattr(prepared.options, name)) for name in ("gamma", "half_life", "num_neighbors")}
    for layer, means in references.means.items():
        nearest = max(kinds, key=lambda kind: kind.means[layer].mean().item())
        level, drift, variance = _line(references, layer)
        background, background_drift, background_variance = _line(nearest, layer)
        least = max(_LEAST_GAP * means.mean().item(), 1e-6)
        gap = max(means.mean().item() - nearest.means[layer].mean().item(), least)
        weight = max(gap * gap / max(variance + background_variance, 1e-9), 1e-6)  # how well it tells the two apart
        warmup = max(references.warmup.min(), nearest.warmup.min()).item()
        gap_later, gap_first = (
            max(level - background + (drift - background_drift) * place, least) for place in (warmup, 1.0)
        )
        change = (gap_first - gap_later) / (1 - warmup)  # of the gap, per unit of warmup
        stats[layer] = CalibrationStats(
            reference_mean=level,
            background_mean=level - gap_later + change * warmup,
            weight=weight,
            threshold=0.0,
            width=1.0,
            scale=prepared.memory.layers[layer].scale,
            reference_drift=drift,
            background_drift=drift - change,
            min_warmup=warmup,
            open_shift=references.open_shifts[layer],
            background_open_shift=nearest.open_shifts[layer],
            **options,
        )
    return stats


def evidence_and_opening(
    stats: dict[int, CalibrationStats], observation: Observation, routes: bool = True
) -> tuple[Tensor, Tensor]:
    """
    (n,) each: the mean evidence of all layers, which the last one sees, and how far the memory opens, in the mean of
    its layers. What a memory that is partly open sees is taken to lie between what it sees closed and open; one that
    does not change the routing (`routes`) sees what a closed one does.
    """
    before, openings = Evidence(), []
    for layer, of_layer in stats.items():
        closed, opened = observation.means[layer], observation.open_means[layer]
        mean = closed + before.opening * (opened - closed) + of_layer.shift(before) if routes else closed
        before = of_layer.accumulated(before, mean, observation.warmup)
        openings.append(before.opening)
    return before.evidence / before.weight, torch.stack(openings).mean(dim=0)


def _line(observation: Observation, layer: int) -> tuple[float, float, float]:
    """
    The running mean as level + drift * warmup, and the variance that is left.

    By least squares with a ridge: where all targets come late, warmup hardly varies and says nothing of a beginning.
    """
    means, warmup = observation.means[layer].double(), observation.warmup.double()
    centred = warmup - warmup.mean()
    drift = (centred @ means) / (centred @ centred + _RIDGE * len(means))
    left = means - means.mean() - drift * centred
    return (means.mean() - drift * warmup.mean()).item(), drift.item(), left.square().mean().item()
