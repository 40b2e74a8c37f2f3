"""Calibrations written by hand."""

from collections.abc import Mapping
from dataclasses import replace

from knnmoe_hf import RoutingMemory
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.lookup.make import reference_stats
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.memory.manifest import CalibrationRecord


def stats_of(memory: RoutingMemory, layer: int, **given) -> CalibrationStats:
    """CalibrationStats for a memory as it is; half open at 0.5."""
    options = {name: float(getattr(memory.config, name)) for name in ("gamma", "half_life", "num_neighbors")}
    known = dict(
        reference_mean=1.0, background_mean=0.0, weight=1.0, threshold=0.5, width=0.1, scale=memory.layers[layer].scale
    )
    return CalibrationStats(**(known | options | given))


def with_stats(memory: RoutingMemory, by_layer: Mapping[int, dict] | None = None, **given) -> RoutingMemory:
    """The memory with `stats_of` in each layer."""
    by_layer = by_layer or {}
    layers = {
        layer: replace(rows, stats=stats_of(memory, layer, **(by_layer.get(layer, {}) | given)))
        for layer, rows in memory.layers.items()
    }
    return replace(memory, layers=layers)


def with_fit(memory: RoutingMemory, **given) -> RoutingMemory:
    """A memory of confidence "calibrated" that opens as by "context", with a fit for each recall of next tokens."""
    options = memory.config.retrieval_options()
    layers = {layer: replace(rows, stats=reference_stats(rows, options)) for layer, rows in memory.layers.items()}
    known = dict(threshold=0.7, width=0.3, next_token_weight=0.6, next_token_temperature=0.5, next_token_neighbors=64)
    fit = RecallFit(**(known | given), gain=0.1, harm={})
    record = CalibrationRecord(0.5, 0.1, 0.1, {}, [], {}, fits={"next_tokens": fit, "both": fit})
    return replace(memory, layers=layers, calibration=record)
