"""Fits the statistics of `confidence="calibrated"`: how similar text like the references looks to a memory, how
similar background text does, and how far the memory may open in between.

The model is only read: one pass over held-out references and background text with the memory open, one with it closed.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from knnmoe_hf.calibration.background import BackgroundText, prepare_background
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.next_tokens import Seen
from knnmoe_hf.calibration.observe import Observation, observe
from knnmoe_hf.calibration.recall import able_to_recall, fit_recalls, log_fits
from knnmoe_hf.calibration.verdict import measure_verdict
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.evaluation.scores import score_kinds
from knnmoe_hf.lookup.confidence import CalibrationStats, Evidence
from knnmoe_hf.lookup.next_tokens import voters_of
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.models.attach import AttachedMemory, prepare
from knnmoe_hf.models.hooks import hooked, using_overrides

logger = logging.getLogger(__name__)

MEAN_HARM, WORST_HARM = 0.004, 0.008
"""Nats per token that a calibrated memory may cost on background text: in the mean of all kinds, and on any kind."""
# lower thresholds open on text that was not shown; with the last one a memory never opens
_THRESHOLDS = [round(0.54 + 0.04 * step, 2) for step in range(25)] + [2.0, 3.0, 5.0, 10.0, 100.0]
_WIDTH = 0.04
_RIDGE = 1e-3  # ridge strength, in units of tokens; Var(warmup) of 256-token windows is about 0.05
_LEAST_GAP = 0.02  # between references and background of a layer that does not tell them apart, relative


def calibrate(
    model: nn.Module,
    memory: RoutingMemory,
    background: Mapping[str, Sequence[dict]],
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
        background: text by kind, on which the memory should do nothing: rows as `prepare_dataset` takes them,
            of which 64 of each kind are read. Rows of text need the memory's tokenizer.
        batch_size: examples per forward pass.
        processes: that take turns at the batches; all of them call this alike and get the same.

    Returns:
        A memory with calibration statistics and a verdict measured anew (`memory.verdict`), and the record of what was
        read and found, which the memory holds too.
        The memory and None, with a warning, if there are too few references to hold any out, or if no background text
        is left that the memory does not help on. It is as it was but for the record of what was read, which it gets if
        it was never calibrated.
    """
    options = memory.config.retrieval_options()
    texts = prepare_background(background, memory.tokenizer, None)
    with hooked(model):
        prepared = prepare(model, memory, replace(options, confidence="rbf"))
        fitted, record, obstacle = calibrate_prepared(model, prepared, texts, batch_size, processes)
        if obstacle is not None:
            logger.warning("%s: confidence='calibrated' falls back to 'context'", obstacle)
            return fitted.memory, None
        used = fitted.with_options(options)
        verdict = measure_verdict(model, used, texts, batch_size, processes)
    for sentence in verdict.sentences():
        logger.info("%s", sentence)
    return replace(fitted.memory, verdict=verdict), record


def calibrate_prepared(
    model: nn.Module,
    prepared: AttachedMemory,
    background: Mapping[str, BackgroundText],
    batch_size: int,
    processes: Processes,
) -> "Fit":
    """`calibrate` of a memory that was prepared for the model: only confidences change, engines are made once."""
    run = _Run(model, batch_size, processes)
    texts = {kind: text.rows for kind, text in background.items()}
    read = {kind: text.record() for kind, text in background.items()}
    _log_read(read)
    with hooked(model):
        routing = prepared.with_options(replace(prepared.options, recall="routing"))
        able = able_to_recall(model, routing)
        voters = voters_of(prepared.options) if able is not None else None
        observed = _observe_all(run, routing, texts, voters)
        if isinstance(observed, str):
            return Fit(_only_read(prepared, read), None, observed)
        references, kinds, excluded = observed
        stats = _stats(references, list(kinds.values()), routing)
        fitted, stats, threshold, harm = _fit_threshold(run, routing, stats, kinds, texts)
        gain, open_gain = -references.change(_mean_opening(stats, references)), -references.change()
        record = CalibrationRecord(threshold, gain, open_gain, harm, excluded, read)
        if able is not None:
            able = able.with_options(fitted.options, replace(fitted.memory, calibration=record))
            record = replace(record, fits=_fits(run, able, stats, references, kinds, texts))
    _log(record)
    options = replace(prepared.options, confidence="calibrated")
    fitted = (fitted if able is None else able).with_options(options, replace(fitted.memory, calibration=record))
    return Fit(fitted, record, None)


def _fits(
    run: "_Run",
    able: AttachedMemory,
    stats: dict[int, CalibrationStats],
    references: Observation,
    kinds: Mapping[str, Observation],
    texts: Mapping[str, Sequence[dict]],
) -> dict[str, RecallFit]:
    """What is fitted for the recall of next tokens, with and without routing, whose calibration `able` holds."""

    def seen(observation: Observation) -> Seen:
        return Seen(observation, *_evidence(stats, observation))

    return fit_recalls(
        able,
        seen(references),
        {kind: seen(observation) for kind, observation in kinds.items()},
        lambda used: _harm(run, used, kinds, texts),
        (MEAN_HARM, WORST_HARM),
    )


class Fit(NamedTuple):
    """
    A memory after its calibration.

    Attributes:
        prepared: with the statistics, if there are any.
        record: of what was read and found; None if there was an obstacle.
        obstacle: why nothing could be fitted, in words; None if it could.
    """

    prepared: AttachedMemory
    record: CalibrationRecord | None
    obstacle: str | None


def _only_read(prepared: AttachedMemory, read: Mapping[str, dict]) -> AttachedMemory:
    """A memory that was never calibrated, with a record of what was read for it in vain; any other as it is."""
    memory = prepared.memory
    calibrated = memory.calibration is not None or any(rows.stats is not None for rows in memory.layers.values())
    if calibrated or not any(text["examples"] for text in read.values()):
        return prepared
    memory = replace(memory, calibration=CalibrationRecord(None, None, None, {}, [], read))
    return prepared.with_options(prepared.options, memory)


class _Run(NamedTuple):
    """How the model is run on text."""

    model: nn.Module
    batch_size: int
    processes: Processes


def _observe_all(
    run: _Run, prepared: AttachedMemory, texts: Mapping[str, Sequence[dict]], voters: int | None
) -> tuple[Observation, dict[str, Observation], list[str]] | str:
    """
    Observations of held-out references, of background text by kind, and the kinds that the memory helps on; or else
    what there is too little of.
    """
    if not len(prepared.memory):
        return "there are no rows to calibrate, which max_rows and min_gain left out"
    held = hold_out(prepared.memory)
    observed = observe(run.model, prepared, texts, *run[1:], voters) if held is not None else {}
    if not observed:
        what = "is no background text" if held is not None else "are no references that can be held out"
        if (known := prepared.memory.provenance) is None or not known.has_text:
            what = "is no text of the references, which provenance='ids' and 'none' leave out,"
        return f"there {what} to calibrate by"
    kinds = {kind: observation for kind, observation in observed.items() if observation.rise.mean() > 0}
    if not kinds:
        return f"the memory helps on all background text ({shown(list(observed))})"
    rest = prepared.with_rows_of(prepared.memory.take(held.rest))
    references = observe(run.model, rest, {"references": held.rows}, *run[1:], voters)["references"]
    return references, kinds, [kind for kind in observed if kind not in kinds]


def _fit_threshold(
    run: _Run,
    prepared: AttachedMemory,
    stats: dict[int, CalibrationStats],
    kinds: Mapping[str, Observation],
    texts: Mapping[str, Sequence[dict]],
) -> tuple[AttachedMemory, dict[int, CalibrationStats], float, dict[str, float]]:
    """The lowest threshold whose measured harm is within the bounds, or else the highest, and its harm by kind."""
    first = next((i for i, at in enumerate(_THRESHOLDS) if _within(_expected(_at(stats, at), kinds))), -1)
    for threshold in _THRESHOLDS[first:]:
        stats = _at(stats, threshold)
        fitted = _with_stats(prepared, stats)
        harm = _harm(run, fitted, kinds, texts)
        if _within(harm):
            break
    return fitted, stats, threshold, harm


def _harm(
    run: _Run, fitted: AttachedMemory, kinds: Mapping[str, Observation], texts: Mapping[str, Sequence[dict]]
) -> dict[str, float]:
    """What a memory is measured to cost, by kind of background text."""
    with using_overrides(run.model, fitted):
        scores = score_kinds(run.model, {kind: texts[kind] for kind in kinds}, *run[1:])
    return {kind: found.mean_nll - kinds[kind].closed_nll for kind, found in scores.items()}


def _log_read(background: Mapping[str, dict]) -> None:
    for kind, read in background.items():
        said = "calibrating with background text %r (%s): %d examples, %d tokens, %d files, sha256 %s"
        numbers = (read["examples"], read["tokens"], len(read["files"]), read["sha256"][:16])
        logger.info(said, kind, read["source"], *numbers)


def _log(record: CalibrationRecord) -> None:
    said = "calibrated: threshold %.2f, expected gain %.4f of %.4f nats, harm %s, excluded kinds %s"
    logger.info(said, record.threshold, record.gain, record.open_gain, record.harm, record.excluded)
    log_fits(record.fits)


def _stats(references: Observation, kinds: list[Observation], prepared: AttachedMemory) -> dict[int, CalibrationStats]:
    """Between the references and the kind of background text that looks most like them, by layer; threshold 0."""
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
            width=_WIDTH,
            scale=prepared.memory.layers[layer].scale,
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
    return _evidence(stats, observation)[1]


def _evidence(stats: dict[int, CalibrationStats], observation: Observation) -> tuple[Tensor, Tensor]:
    """(n,) each: the mean evidence of all layers, which the last one sees, and how far the memory opens."""
    evidence, openings = Evidence(), []
    for layer, of_layer in stats.items():
        evidence = of_layer.accumulated(evidence, observation.means[layer], observation.warmup)
        openings.append(evidence.opening)
    return evidence.evidence / evidence.weight, torch.stack(openings).mean(dim=0)


def _with_stats(prepared: AttachedMemory, stats: dict[int, CalibrationStats]) -> AttachedMemory:
    """The same lookups, calibrated, over a memory that holds the statistics."""
    layers = {layer: replace(rows, stats=stats[layer]) for layer, rows in prepared.memory.layers.items()}
    options = replace(prepared.options, confidence="calibrated")
    return prepared.with_options(options, replace(prepared.memory, layers=layers))


def _at(stats: dict[int, CalibrationStats], threshold: float) -> dict[int, CalibrationStats]:
    return {layer: replace(of_layer, threshold=threshold) for layer, of_layer in stats.items()}


def _expected(stats: dict[int, CalibrationStats], kinds: Mapping[str, Observation]) -> dict[str, float]:
    """Expected harm by kind of background text, from what the open memory does to it."""
    return {kind: observation.change(_mean_opening(stats, observation)) for kind, observation in kinds.items()}


def _within(harm: Mapping[str, float]) -> bool:
    return max(harm.values()) <= WORST_HARM and sum(harm.values()) <= MEAN_HARM * len(harm)
