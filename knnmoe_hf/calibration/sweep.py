"""Gain against harm at each threshold, estimated from passes with the memory closed, half open and open."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from knnmoe_hf.calibration.observe import Observation
from knnmoe_hf.calibration.stats import evidence_and_opening
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.memory.sweep import SweepPoint

SWEPT = [round(-0.6 + 0.08 * step, 2) for step in range(27)] + [2.0, 3.0, 5.0, 10.0]
"""Thresholds, from a memory that is nearly always open to one that hardly ever opens."""


def sweep(
    stats: Mapping[int, CalibrationStats],
    references: Observation,
    kinds: Mapping[str, Observation],
    thresholds: Sequence[float] = SWEPT,
) -> list[SweepPoint]:
    """
    What is expected at each of the thresholds, with the width of `stats`.

    Args:
        stats: of each layer.
        references: on text like the references that the memory does not have.
        kinds: on other text by kind, at least one.
        thresholds: ascending; that of `stats` is among the points too.
    """
    own = next(iter(stats.values())).threshold
    return [_point(stats, references, kinds, threshold) for threshold in sorted({*thresholds, own})]


def _point(
    stats: Mapping[int, CalibrationStats],
    references: Observation,
    kinds: Mapping[str, Observation],
    threshold: float,
) -> SweepPoint:
    tried = {layer: replace(of_layer, threshold=threshold) for layer, of_layer in stats.items()}
    gain, *costs = (-_change(tried, references), *(_change(tried, kind) for kind in kinds.values()))
    return SweepPoint(threshold, gain, sum(costs) / len(costs))


def _change(stats: dict[int, CalibrationStats], text: Observation) -> float:
    return text.change(evidence_and_opening(stats, text)[1])


def open_sweep(references: Observation, kinds: Mapping[str, Observation], shares: Sequence[float]) -> list[tuple]:
    """
    The same for memories that were not calibrated: `(share, gain, harm)` at each share, 0 to 1, of an open memory's
    confidence.
    """
    return [
        (share, -references.change(share), sum(kind.change(share) for kind in kinds.values()) / len(kinds))
        for share in shares
    ]
