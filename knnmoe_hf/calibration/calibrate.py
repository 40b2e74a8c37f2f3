"""Fits the statistics of `confidence="calibrated"`: how similar text like the references looks to a memory, how
similar background text does, and how far the memory may open in between.

The model is only read: one pass over held-out references and background text with the memory open, one with it closed.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from knnmoe_hf.calibration.background import BackgroundText, prepare_background
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.observe import Observation, observe
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.evaluation.scores import score_kinds
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.lookup.make import make_confidences
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.models.attach import AttachedMemory, prepare
from knnmoe_hf.models.hooks import hooked, using_overrides

logger = logging.getLogger(__name__)

MEAN_HARM, WORST_HARM = 0.004, 0.008
"""Nats per token that a calibrated memory may cost on background text: in the mean of all kinds, and on any kind."""
# lower thresholds open on text that was not shown; with the last one a memory never opens
_THRESHOLDS = [round(0.54 + 0.04 * step, 2) for step in range(25)] + [2.0, 3.0, 5.0, 10.0, 100.0]
_UNUSUAL = 1.5
_WIDTH = 0.04
_RIDGE = 1e-3  # ridge strength, in units of tokens; Var(warmup) of 256-token windows is about 0.05
_LEAST_GAP = 0.02  # between references and background of a layer that does not tell them apart, relative


def calibrate(
    model: nn.Module,
    memory: RoutingMemory,
    ordinary: Mapping[str, Sequence[dict]],
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> tuple[RoutingMemory, CalibrationRecord | None]:
    """
    Fits each layer's statistics and the threshold of `confidence="calibrated"`.

    The last references are held out for the fit (they stay in the memory). A few before them are left out as well, as
    neighbours in a data set are often of one document.

    Args:
        model: the memory's base model; its weights are only read, memories attached to it are out of force meanwhile.
        memory: with provenance.
        ordinary: background text by kind, on which the memory should do nothing: rows as `prepare_dataset` takes them,
            of which 64 of each kind are read. Rows of text need the memory's tokenizer.
        batch_size: examples per forward pass.
        processes: that take turns at the batches; all of them call this alike and get the same.

    Returns:
        A memory with calibration statistics, and the record of what was read and found, which the memory holds too.
        The memory as it is and None, with a warning, if there are too few references to hold any out, or if no
        background text is left that the memory does not help on.
    """
    options = replace(memory.config.retrieval_options(), confidence="rbf")
    background = prepare_background(ordinary, memory.tokenizer, None)
    with hooked(model):
        prepared = prepare(model, memory, options)
        fitted, record = calibrate_prepared(model, prepared, background, batch_size, processes)
    return fitted.memory, record


def calibrate_prepared(
    model: nn.Module,
    prepared: AttachedMemory,
    background: Mapping[str, BackgroundText],
    batch_size: int,
    processes: Processes,
) -> tuple[AttachedMemory, CalibrationRecord | None]:
    """`calibrate` of a memory that was prepared for the model: only confidences change, engines are made once."""
    memory, held, observed = prepared.memory, hold_out(prepared.memory), {}
    with hooked(model):
        if held is not None:
            texts = {kind: text.rows for kind, text in background.items()}
            observed = observe(model, prepared, texts, batch_size, processes)
        if not observed:
            what = "background text" if held is not None else "references that can be held out"
            logger.warning("no %s to calibrate by: confidence='calibrated' falls back to 'context'", what)
            return prepared, None
        rest = prepared.with_rows_of(memory.take(held.rest))
        references = observe(model, rest, {"references": held.rows}, batch_size, processes)["references"]
        excluded = [kind for kind, observation in observed.items() if observation.rise.mean() <= 0]
        kinds = {kind: observation for kind, observation in observed.items() if kind not in excluded}
        if not kinds:
            logger.warning(
                "the memory helps on all background text (%s): confidence='calibrated' falls back to 'context'",
                shown(excluded),
            )
            return prepared, None
        stats = _stats(references, list(kinds.values()), memory)
        first = next((i for i, at in enumerate(_THRESHOLDS) if _within(_expected(_at(stats, at), kinds))), -1)
        for threshold in _THRESHOLDS[first:]:
            stats = _at(stats, threshold)
            fitted = _with_stats(prepared, stats)
            nll = _measured(model, fitted, {kind: texts[kind] for kind in kinds}, batch_size, processes)
            harm = {kind: nll[kind] - kinds[kind].closed_nll for kind in kinds}
            if _within(harm):
                break
    gain, open_gain = -references.change(_mean_opening(stats, references)), -references.change()
    read = {kind: text.record() for kind, text in background.items()}
    record = CalibrationRecord(threshold, gain, open_gain, harm, excluded, read)
    _log(record)
    fitted.memory = replace(fitted.memory, calibration=record)
    return fitted, record


def _log(record: CalibrationRecord) -> None:
    for kind, read in record.background.items():
        said = "calibrated with background text %r (%s): %d examples, %d tokens, %d files, sha256 %s"
        numbers = (read["examples"], read["tokens"], len(read["files"]), read["sha256"][:16])
        logger.info(said, kind, read["source"], *numbers)
    said = "calibrated: threshold %.2f, expected gain %.4f of %.4f nats, harm %s, excluded kinds %s"
    logger.info(said, record.threshold, record.gain, record.open_gain, record.harm, record.excluded)
    if record.threshold > _UNUSUAL:
        said = "the memory hardly tells its references from background text: of %.4f nats of gain it keeps %.4f"
        logger.warning(said, record.open_gain, record.gain)


def _stats(references: Observation, kinds: list[Observation], memory: RoutingMemory) -> dict[int, CalibrationStats]:
    """Between the references and the kind of background text that looks most like them, by layer; threshold 0."""
    stats = {}
    options = {name: float(getattr(memory.config, name)) for name in ("gamma", "half_life", "num_neighbors")}
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
            width=_WIDTH,
            scale=memory.layers[layer].scale,
            reference_drift=drift,
            background_drift=drift - change,
            min_warmup=warmup,
            open_shift=references.open_shifts[layer],
            **options,
        )
    return stats


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


def _mean_opening(stats: dict[int, CalibrationStats], observation: Observation) -> Tensor:
    """(n,), how far the memory opens for each token, in the mean of its layers."""
    evidence, weight, openings = 0.0, 0.0, []
    for layer, of_layer in stats.items():
        evidence = evidence + of_layer.weight * of_layer.evidence(observation.means[layer], observation.warmup)
        weight += of_layer.weight
        openings.append(of_layer.opening(evidence, weight))
    return torch.stack(openings).mean(dim=0)


def _with_stats(prepared: AttachedMemory, stats: dict[int, CalibrationStats]) -> AttachedMemory:
    """The same lookups, calibrated, over a memory that holds the statistics."""
    layers = {layer: replace(rows, stats=stats[layer]) for layer, rows in prepared.memory.layers.items()}
    memory = replace(prepared.memory, layers=layers)
    options = replace(memory.config.retrieval_options(), confidence="calibrated")
    return prepared.with_confidences(make_confidences(memory.layers, options), memory)


def _at(stats: dict[int, CalibrationStats], threshold: float) -> dict[int, CalibrationStats]:
    return {layer: replace(of_layer, threshold=threshold) for layer, of_layer in stats.items()}


def _expected(stats: dict[int, CalibrationStats], kinds: Mapping[str, Observation]) -> dict[str, float]:
    """Expected harm by kind of background text, from what the open memory does to it."""
    return {kind: observation.change(_mean_opening(stats, observation)) for kind, observation in kinds.items()}


def _within(harm: Mapping[str, float]) -> bool:
    return max(harm.values()) <= WORST_HARM and sum(harm.values()) <= MEAN_HARM * len(harm)


def _measured(
    model: nn.Module,
    memory: AttachedMemory,
    texts: Mapping[str, Sequence[dict]],
    batch_size: int,
    processes: Processes,
) -> dict[str, float]:
    """Mean NLL of each kind with this memory in force."""
    with using_overrides(model, memory):
        scores = score_kinds(model, texts, batch_size, processes)
    return {kind: found.mean_nll for kind, found in scores.items()}
