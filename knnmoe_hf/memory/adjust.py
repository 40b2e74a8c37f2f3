"""
The same rows, used otherwise: fewer layers, other options, another point of the confidence.

Each function makes a new memory and changes nothing of the one that it is given. They are methods of `RoutingMemory`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from knnmoe_hf.errors import MemoryMismatchError, counted, shown
from knnmoe_hf.memory.data import Memory, MemoryData
from knnmoe_hf.memory.history import OPTIONS_CHANGED, changes, noted
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.memory.numbers import SMALL

if TYPE_CHECKING:  # a class of transformers, which takes seconds to import
    from knnmoe_hf.config import KNNMoEConfig


def select_layers(memory: Memory, layers: Iterable[int]) -> Memory:
    """
    A memory of some layers; in the others the model routes as without a memory.

    Rows and statistics stay as they are; the verdict is dropped, and so is what the calibration expected with all
    layers, which `knnmoe_hf.calibrate` fits anew. How next tokens are recalled was fitted to the last layer, and goes
    with it.

    Args:
        layers: to keep, at least one.

    Raises:
        ValueError: if there is none, or one that has no rows.
    """
    wanted = list(layers)
    if not wanted or not all(isinstance(one, Integral) and one in memory.layers for one in wanted):
        raise ValueError(
            f"layers={shown(wanted)} is not allowed: choose one or more of those that have rows, "
            f"{shown(list(memory.layers))}."
        )
    kept = {layer: rows for layer, rows in memory.layers.items() if layer in set(wanted)}
    record = memory.calibration
    if record is not None and len(kept) < len(memory.layers):
        fits = record.fits if max(memory.layers) in kept else {}
        fits = {recall: replace(fit, gain=None, harm={}) for recall, fit in fits.items()}
        known = {} if record.threshold is None else {"gain": None, "harm": {}, "sweep": []}
        record = replace(record, fits=fits, **known)
    left = replace(memory, layers=kept, calibration=record, verdict=None)
    return noted(left, f"layers {list(kept)} of {counted(len(memory.layers), 'layer')} were kept")


def with_options(memory: Memory, **options: Any) -> Memory:
    """
    The same rows, searched and mixed with other options of `KNNMoEConfig`; what was measured with others is dropped.

    Raises:
        MemoryMismatchError: for an option that says how rows are stored (`recoded` changes those), or `layers`.
        ValueError: for any other bad option.
    """
    if options.get("layers") is not None:
        raise MemoryMismatchError(
            f"layers={shown(options['layers'])} is not an option of how rows are used: keep some with `select_layers`."
        )
    config = with_given(memory.config, options | {"layers": memory.config.layers})
    verdict = memory.verdict if memory.verdict is not None and memory.verdict.holds_for(config) else None
    other = replace(memory, config=config, verdict=verdict)
    other.check_config()
    changed = changes(memory.config, config)
    return noted(other, f"{OPTIONS_CHANGED}{', '.join(changed)}") if changed else other


def with_given(config: "KNNMoEConfig", options: Mapping[str, Any]) -> "KNNMoEConfig":
    """
    A copy of a configuration with other options.

    Raises:
        ValueError: for an option that is not allowed.
    """
    changed = type(config)(**config.saved() | dict(options))
    changed.name_or_path = config.name_or_path
    return changed


def with_threshold(
    memory: Memory,
    threshold: float | None = None,
    width: float | None = None,
    next_token_threshold: float | None = None,
) -> Memory:
    """
    A calibrated memory that opens at another point: at a lower threshold it gains more, and harms more elsewhere.

    The verdict is dropped, and so is what the calibration expected at its own point; `calibration.sweep` has what it
    expected at others. `knnmoe evaluate` measures what the memory does now.

    Args:
        threshold: of the routing, between background text (0) and the references (1).
        width: how softly it opens around that.
        next_token_threshold: the same for the recall of next tokens, which has a threshold of its own.

    Raises:
        ValueError: for a memory that is not calibrated, whose confidence has no threshold, or for a number that is not
            allowed.
    """
    given = {"threshold": threshold, "width": width, "next_token_threshold": next_token_threshold}
    given = {name: _checked(name, value) for name, value in given.items() if value is not None}
    record, stats = memory.calibration, {layer: rows.stats for layer, rows in memory.layers.items()}
    if (reason := _why_no_threshold(memory)) is not None:
        raise ValueError(f"this memory has no threshold to set: {reason}.")
    if next_token_threshold is not None and (record is None or not record.fits):
        raise ValueError(
            f"next_token_threshold={next_token_threshold} is not possible: the recall of next tokens was not fitted "
            "to this memory, so leave it out, or calibrate the memory anew."
        )
    if not given:
        return replace(memory)
    of_routing = {name: value for name, value in given.items() if name != "next_token_threshold"}
    layers = {layer: replace(rows, stats=replace(stats[layer], **of_routing)) for layer, rows in memory.layers.items()}
    first, fits = next(iter(stats.values())), record.fits if record is not None else {}
    before = {"threshold": f"{first.threshold:g}", "width": f"{first.width:g}"}
    before["next_token_threshold"] = " and ".join(f"{fit.threshold:g}" for fit in fits.values())
    said = ", ".join(f"{name} {before[name]} -> {value:g}" for name, value in given.items())
    record = _opening_at(record, of_routing, given.get("next_token_threshold")) if record is not None else None
    other = replace(memory, layers=layers, calibration=record, verdict=None)
    return noted(other, f"its confidence was set by hand: {said}")


def _checked(name: str, value: float) -> float:
    right_type = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right_type or not abs(value) <= 1 / SMALL or (name == "width" and value <= SMALL):
        what = f"a number above {SMALL:g}" if name == "width" else "a number"
        raise ValueError(f"{name}={shown(value)} is not allowed: use {what}, of at most {1 / SMALL:g}.")
    return float(value)


def _why_no_threshold(memory: MemoryData) -> str | None:
    confidence = memory.config.confidence
    if confidence != "calibrated":
        instead = {"rbf": "set gamma", "context": "set context_threshold"}[confidence]
        return f"its confidence is {confidence!r}, so {instead}, or use confidence='calibrated'"
    if any(rows.stats is None for rows in memory.layers.values()):
        return "it is not calibrated, so calibrate it (knnmoe calibrate), or set context_threshold"
    return None


def _opening_at(
    record: CalibrationRecord, of_routing: Mapping[str, float], token_threshold: float | None
) -> CalibrationRecord:
    """The record of a calibration whose thresholds were replaced; what they gain is known at a point of its sweep."""
    fits = dict(record.fits)
    for recall, fit in fits.items():
        if of_routing and recall == "both":  # which may have had a threshold of the routing of its own
            fit = replace(fit, routing_threshold=None, gain=None, harm={})
        if token_threshold is not None:
            fit = replace(fit, threshold=token_threshold, gain=None, harm={})
        fits[recall] = fit
    if not of_routing:
        return replace(record, fits=fits)
    threshold = of_routing.get("threshold", record.threshold)
    sweep = record.sweep if "width" not in of_routing else []  # which has the gains of one width
    gain = next((point.gain for point in sweep if point.threshold == threshold), None)
    return replace(record, threshold=threshold, gain=gain, harm={}, fits=fits, sweep=sweep)
