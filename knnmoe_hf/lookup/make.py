"""One lookup for each layer of a memory: its confidence and its implementation are chosen here, once."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.lookup.confidence import CalibrationStats, Confidence, InContext, Rbf, similarity
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.native_lookup import NativeLookup
from knnmoe_hf.lookup.next_tokens import Voting, num_voters_of
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.lookup.rules import Router
from knnmoe_hf.lookup.torch_lookup import TorchLookup

logger = logging.getLogger(__name__)


def make_lookups(
    layers: Mapping[int, LayerRows],
    routers: Mapping[int, Router],
    options: RetrievalOptions,
    next_tokens: Tensor | None = None,
    fits: Mapping[str, RecallFit] = MappingProxyType({}),
) -> dict[int, TorchLookup]:
    """
    Lookups for the layers of a memory.

    Args:
        layers: `{layer: rows}`, each on the device where the layer's gate runs; layers without rows are left out.
        routers: `{layer: the model's own routing}`.
        options: how to search and mix.
        next_tokens: (N,) int32, the token that follows each row; needed unless `options.recall` is `"routing"`.
        fits: `{recall: what a calibration has fitted for it}`.

    Returns:
        `{layer: lookup}`: `NativeLookup` where native code was compiled and the rows are on the CPU.

    Raises:
        ValueError: for a routing width of more experts than there are.
        ImportError: for a search backend that is not installed.
    """
    layers = {layer: rows for layer, rows in sorted(layers.items()) if len(rows.key_codes)}
    fit = fit_for(layers, options, fits)
    confidences = make_confidences(layers, options, fit)
    voting = make_voting(layers, options, next_tokens, fit)
    lookups = {}
    for layer, rows in layers.items():
        kind = NativeLookup if native.on(rows.key_codes.device) is not None else TorchLookup
        lookups[layer] = kind(layer, rows, confidences[layer], *routers[layer], options, voting.get(layer))
    return lookups


def fit_for(
    layers: Mapping[int, LayerRows], options: RetrievalOptions, fits: Mapping[str, RecallFit]
) -> RecallFit | None:
    """
    What a calibration has fitted for the options' `recall`; None if that is routing, if the options name another
    confidence, or, with a warning, if a calibrated memory has no fit for it, or one that was made for other options.
    """
    if not layers or options.recall == "routing" or options.confidence != "calibrated":
        return None
    if _obstacle(layers, options) is not None:
        return None
    fit = fits.get(options.recall)
    difference = "not fitted by the calibration" if fit is None else fit.differs(num_voters_of(options))
    if difference is None:
        return fit
    if None in (options.next_token_weight, options.next_token_temperature):
        logger.warning(
            "the recall of next tokens was %s: its defaults are used instead, and nothing bounds their harm; "
            "knnmoe_hf.calibrate (knnmoe calibrate) fits it anew",
            difference,
        )
    return None


def make_voting(
    layers: Mapping[int, LayerRows],
    options: RetrievalOptions,
    next_tokens: Tensor | None,
    fit: RecallFit | None = None,
) -> dict[int, Voting]:
    """
    How the last layer's neighbours vote for the next token, by layer; an empty mapping if the options recall routing
    alone, or if there are no layers.

    Args:
        layers, options, next_tokens: as in `make_lookups`.
        fit: see `fit_for`.

    Raises:
        ValueError: if the options recall next tokens and there are none.
    """
    if options.recall == "routing" or not layers:
        return {}
    if next_tokens is None:
        raise ValueError(
            f"recall={options.recall!r} needs the token that follows each row, and there is none: use "
            "recall='routing', or give next_tokens."
        )
    last = max(layers)
    return {last: Voting.of(next_tokens.to(layers[last].key_codes.device), options, fit)}


def make_confidences(
    layers: Mapping[int, LayerRows], options: RetrievalOptions, fit: RecallFit | None = None
) -> dict[int, Confidence]:
    """
    The confidence that the options name, for each layer of a memory.

    `"calibrated"` takes its statistics from the memory. One that holds none, or that was calibrated for other options,
    falls back to `"context"`, with a warning.

    Args:
        layers, options: as in `make_lookups`.
        fit: see `fit_for`; its threshold for the routing counts unless the options name a `next_token_weight`.
    """
    if options.confidence == "rbf":
        return {layer: Rbf(rows.scale, options.gamma) for layer, rows in layers.items()}
    obstacle = _obstacle(layers, options) if options.confidence == "calibrated" else None
    if obstacle is not None:
        logger.warning(
            "%s: confidence='calibrated' falls back to 'context'; knnmoe_hf.calibrate (knnmoe calibrate) "
            "fits it to background text",
            obstacle,
        )
    is_calibrated = options.confidence == "calibrated" and obstacle is None
    changes = {}
    if fit is not None and fit.routing_threshold is not None and options.next_token_weight is None:
        changes = {"threshold": fit.routing_threshold}
    if options.recall == "next_tokens":  # no layer changes the inputs of those after it
        changes |= {"open_shift": 0.0, "background_open_shift": 0.0}
    confidences: dict[int, Confidence] = {}
    previous = None
    for layer, rows in sorted(layers.items()):
        stats = rows.stats if is_calibrated else reference_stats(rows, options)
        confidences[layer] = InContext(layer, replace(stats, **changes), previous)
        previous = layer
    return confidences


def _obstacle(layers: Mapping[int, LayerRows], options: RetrievalOptions) -> str | None:
    for rows in layers.values():
        if rows.stats is None:
            return "the memory holds no calibration"
        if (difference := rows.stats.differs(options)) is not None:
            return f"the memory was calibrated for {difference}"
    return None


def reference_stats(rows: LayerRows, options: RetrievalOptions) -> CalibrationStats:
    """The statistics of `"context"`: the references' mean similarity to rows of other examples, and none of others."""
    mean = similarity(rows.distances, rows.scale, options.gamma).mean().item() if len(rows.distances) else 1.0
    return CalibrationStats(
        reference_mean=max(mean, 1e-6),
        background_mean=0.0,
        weight=1.0,
        threshold=float(options.context_threshold),
        width=float(options.context_width),
        scale=rows.scale,
        gamma=float(options.gamma),
        half_life=float(options.half_life),
        num_neighbors=float(options.num_neighbors),
    )
