"""What a memory's manifest says of one layer: sizes, scale and stats."""

from dataclasses import dataclass, fields

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.blocks import LARGEST
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.memory.numbers import SMALL, is_count, is_finite, is_moderate

_MOST = {"layer": 2**16, "hidden_size": 2**24, "num_experts": 2**15}
"""Experts are stored as int16, and no model comes near the others."""
_LEAST_SCALE = 1e-45  # the least float32 above 0
_FITTED_WITH = ("scale", "gamma", "half_life", "num_neighbors")  # of the fields of `CalibrationStats`


@dataclass(frozen=True)
class LayerSizes:
    """
    One layer's entry.

    Attributes:
        layer: index of the decoder layer.
        hidden_size, num_experts: of the model's layer.
        sample: shape of the stored distances.
        scale: median neighbour distance.
        stats: of `confidence="calibrated"`, or None.
    """

    layer: int
    hidden_size: int
    num_experts: int
    sample: tuple[int, int]
    scale: float
    stats: CalibrationStats | None = None

    @classmethod
    def of_json(cls, entry: dict) -> "LayerSizes":
        """
        From plain JSON values.

        Raises:
            LookupError, TypeError, ValueError: for what cannot be said of a layer.
        """
        stats = entry["stats"]
        if stats is not None and set(stats) != {field.name for field in fields(CalibrationStats)}:
            raise ValueError(f"stats {shown(stats)} are not the stats of a layer")
        parts = {"sample": tuple(entry["sample"]), "stats": CalibrationStats(**stats) if stats is not None else None}
        sizes = cls(**entry | parts)
        sizes._check()
        return sizes

    def _check(self) -> None:
        for name, most in _MOST.items():
            size, least = getattr(self, name), 0 if name == "layer" else 1
            if not is_count(size) or not least <= size <= most:
                raise ValueError(f"{name} {shown(size)} of a layer is not from {least} to {most}")
        if len(self.sample) != 2 or not all(is_count(size) and size <= _MOST["hidden_size"] for size in self.sample):
            raise ValueError(f"sample {shown(self.sample)} of layer {self.layer} is not a shape of distances")
        if not is_finite(self.scale) or not _LEAST_SCALE <= self.scale <= LARGEST:
            raise ValueError(f"scale {shown(self.scale)} of layer {self.layer} is not a distance")
        if self.stats is not None and not _are_stats(self.stats):
            raise ValueError(f"stats of layer {self.layer} are none that a calibration finds")


def _are_stats(stats: CalibrationStats) -> bool:
    """Whether a calibration can have found these: the references are more similar than background text throughout."""
    fitted = [value for name, value in vars(stats).items() if name not in _FITTED_WITH]
    options = [getattr(stats, name) for name in _FITTED_WITH]
    if not all(map(is_moderate, fitted)) or not all(is_finite(one) and one <= LARGEST for one in options):
        return False
    gap, drift = stats.reference_mean - stats.background_mean, stats.reference_drift - stats.background_drift
    apart = 0 <= stats.min_warmup < 1 and min(gap + drift * stats.min_warmup, gap + drift) > SMALL
    positive = min(stats.weight, stats.width) > SMALL and min(stats.half_life, stats.num_neighbors) > 0
    return apart and positive and stats.gamma >= 0 and stats.scale >= _LEAST_SCALE
