"""Calibrations written by hand."""

import copy
from collections.abc import Mapping
from dataclasses import replace

from knnmoe_hf import RoutingMemory
from knnmoe_hf.lookup.confidence import Levels


def levels_of(memory: RoutingMemory, layer: int, **given) -> Levels:
    """Levels for a memory as it is; half open at 0.5."""
    options = {name: float(getattr(memory.config, name)) for name in ("gamma", "half_life", "num_neighbors")}
    known = dict(own=1.0, ordinary=0.0, weight=1.0, threshold=0.5, width=0.1, scale=memory.layers[layer].scale)
    return Levels(**(known | options | given))


def with_levels(memory: RoutingMemory, by_layer: Mapping[int, dict] | None = None, **given) -> RoutingMemory:
    """The memory with `levels_of` in each layer."""
    fitted = copy.copy(memory)
    by_layer = by_layer or {}
    fitted.layers = {
        layer: replace(rows, levels=levels_of(memory, layer, **(by_layer.get(layer, {}) | given)))
        for layer, rows in memory.layers.items()
    }
    return fitted
