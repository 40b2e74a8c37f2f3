"""Fits the statistics of `confidence="calibrated"`: how similar text like the references looks to a memory, how
similar background text does, and how far the memory may open in between.

The model is only read: passes over held-out references and background text with the memory open, half open and closed,
and one over background text for each threshold that is tried.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from knnmoe_hf.calibration.background import BackgroundText, prepare_background
from knnmoe_hf.calibration.next_tokens import Seen
from knnmoe_hf.calibration.observe import Observation, Observed, observe_all
from knnmoe_hf.calibration.recall import able_to_recall, fit_recalls, log_fits, with_fit
from knnmoe_hf.calibration.stats import evidence_and_opening, fit_stats
from knnmoe_hf.calibration.sweep import sweep
from knnmoe_hf.calibration.verdict import measure_verdict
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.scores import score_kinds
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.lookup.next_tokens import num_voters_of
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.models.attach import AttachedMemory, prepare
from knnmoe_hf.models.hooks import hooked, using_overrides

logger = logging.getLogger(__name__)

MEAN_HARM, WORST_HARM = 0.004, 0.005
"""
Nats per token that a calibrated memory may cost on background text: in the mean of all kinds, and on any kind. Other
windows of the same kind cost up to twice as much, and a verdict tolerates 0.008.
"""
RECALL_HARM = (0.002, 0.004)
"""The same bounds for the recall of next tokens: narrower, as it harms unread text more than routing."""
# from a memory that is nearly always open to one that never opens
_THRESHOLDS = [round(-0.6 + 0.04 * step, 2) for step in range(54)] + [2.0, 3.0, 5.0, 10.0, 100.0]
# Harm grows faster with the opening than gain does, so a wide sigmoid, which leaves the memory partly open on text
# that looks like both references and background, usually keeps more gain; a narrow one where the two differ clearly
_WIDTHS = [0.3, 0.1, 0.04]
_WIDE_ENOUGH = 0.98  # of the most gain: a width that keeps this much is taken before narrower ones, which know less
_KEPT = 0.99  # of the most gain with a width: harm that buys less than the rest is not worth it
# A threshold up to the middle between background text and references is taken for this much of an open memory's gain:
# a lower one gains little more, and may cost on text in between, of which a calibration reads none
_ENOUGH, _MIDDLE = 0.95, 0.5


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
        verdict, measured = measure_verdict(model, used, texts, batch_size, processes)
    for sentence in verdict.sentences():
        logger.info("%s", sentence)
    kinds = ", ".join(sorted(record.harm))
    card_data = replace(fitted.memory.card_data, measured=measured)
    card_data = card_data.noted(f"it was calibrated anew, threshold {record.threshold:g}, background text: {kinds}")
    return replace(fitted.memory, verdict=verdict, card_data=card_data), record


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
        ready, num_voters = prepared.with_options(replace(prepared.options, recall="routing")), None
        if (able := able_to_recall(model, ready)) is not None:
            ready, num_voters = able, num_voters_of(prepared.options)
        observed = observe_all(model, ready, texts, batch_size, processes, num_voters)
        if isinstance(observed, str):
            return Fit(_only_read(prepared, read), None, observed)
        references, kinds, excluded, _, rest = observed
        stats = fit_stats(references, list(kinds.values()), ready)
        fitted, stats, threshold, harm = _fit_threshold(run, ready, stats, references, kinds, texts)
        gain, open_gain = -references.change(_mean_opening(stats, references)), -references.change()
        record = CalibrationRecord(threshold, gain, open_gain, harm, excluded, read)
        record = replace(record, sweep=sweep(stats, references, kinds))
        if num_voters is not None:
            fitted = fitted.with_options(fitted.options, replace(fitted.memory, calibration=record))
            rest = _with_stats(rest.with_options(rest.options, replace(rest.memory, calibration=record)), stats)
            record = replace(record, fits=_fits(run, fitted, rest, stats, observed, texts))
    _log(record)
    options = replace(prepared.options, confidence="calibrated")
    return Fit(fitted.with_options(options, replace(fitted.memory, calibration=record)), record, None)


def _fits(
    run: "_Run",
    fitted: AttachedMemory,
    rest: AttachedMemory,
    stats: dict[int, CalibrationStats],
    observed: Observed,
    texts: Mapping[str, Sequence[dict]],
) -> dict[str, RecallFit]:
    """
    What is fitted for the recall of next tokens, with and without routing, whose calibration `fitted` holds, and so
    does `rest`, which is the same memory without the held-out references.
    """
    references, kinds, *_ = observed
    width = next(iter(stats.values())).width

    def see(observation: Observation, threshold: float | None) -> Seen:
        if threshold is None:
            return Seen(observation, evidence_and_opening(stats, observation, routes=False)[0], 0.0)
        return Seen(observation, *evidence_and_opening(_at(stats, threshold, width), observation))

    def measure(fit: RecallFit) -> tuple[float, dict[str, float]]:
        with using_overrides(run.model, with_fit(rest, fit)):
            (scores,) = score_kinds(run.model, {"references": observed.held}, *run[1:]).values()
        return references.closed_nll - scores.mean_nll, _harm(run, with_fit(fitted, fit), kinds, texts)

    return fit_recalls(fitted, see, references, kinds, measure, RECALL_HARM)


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


def _fit_threshold(
    run: _Run,
    prepared: AttachedMemory,
    stats: dict[int, CalibrationStats],
    references: Observation,
    kinds: Mapping[str, Observation],
    texts: Mapping[str, Sequence[dict]],
) -> tuple[AttachedMemory, dict[int, CalibrationStats], float, dict[str, float]]:
    """
    From the threshold that is expected to be the best to higher ones, the first whose measured harm is within the
    bounds, or else the highest of all; and its harm by kind.
    """
    width, first = _expected_best(stats, references, kinds)
    for threshold in _THRESHOLDS[first:]:
        stats = _at(stats, threshold, width)
        fitted = _with_stats(prepared, stats)
        harm = _harm(run, fitted, kinds, texts)
        if _within(harm):
            break
    return fitted, stats, threshold, harm


def _expected_best(
    stats: dict[int, CalibrationStats], references: Observation, kinds: Mapping[str, Observation]
) -> tuple[float, int]:
    """
    The width, and the place of the threshold to begin with.

    Of the widest that keeps nearly the most gain within the bounds, the highest threshold that does so, or a higher
    one up to `_MIDDLE` that keeps `_ENOUGH` of an open memory's gain; where nothing gains, the widest and the lowest
    threshold within the bounds; where none is, the last.
    """
    gains: dict[float, dict[int, float]] = {width: {} for width in _WIDTHS}
    for width, place in itertools.product(_WIDTHS, range(len(_THRESHOLDS))):
        tried = _at(stats, _THRESHOLDS[place], width)
        if _within(_expected(tried, kinds)):
            gains[width][place] = -references.change(_mean_opening(tried, references))
    most = {width: max(found.values(), default=0.0) for width, found in gains.items()}
    width = next(width for width in _WIDTHS if most[width] >= _WIDE_ENOUGH * max(most.values()))
    if most[width] <= 0:
        return width, min(gains[width], default=len(_THRESHOLDS) - 1)
    best = [place for place, gain in gains[width].items() if gain >= _KEPT * most[width]]
    enough = [place for place, gain in gains[width].items() if gain >= -_ENOUGH * references.change()]
    return width, max(best + [place for place in enough if _THRESHOLDS[place] <= _MIDDLE])


def _harm(
    run: _Run, fitted: AttachedMemory, kinds: Mapping[str, Observation], texts: Mapping[str, Sequence[dict]]
) -> dict[str, float]:
    """The measured rise of the NLL by kind of background text, in nats per token."""
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


def _mean_opening(stats: dict[int, CalibrationStats], observation: Observation) -> Tensor:
    """(n,), how far the memory opens for each token, in the mean of its layers."""
    return evidence_and_opening(stats, observation)[1]


def _with_stats(prepared: AttachedMemory, stats: dict[int, CalibrationStats]) -> AttachedMemory:
    """The same lookups, calibrated, over a memory that holds the statistics."""
    layers = {layer: replace(rows, stats=stats[layer]) for layer, rows in prepared.memory.layers.items()}
    options = replace(prepared.options, confidence="calibrated")
    return prepared.with_options(options, replace(prepared.memory, layers=layers))


def _at(stats: dict[int, CalibrationStats], threshold: float, width: float) -> dict[int, CalibrationStats]:
    return {layer: replace(of_layer, threshold=threshold, width=width) for layer, of_layer in stats.items()}


def _expected(stats: dict[int, CalibrationStats], kinds: Mapping[str, Observation]) -> dict[str, float]:
    """The rise of the NLL by kind, estimated from passes with the memory closed, half open and open."""
    return {kind: observation.change(_mean_opening(stats, observation)) for kind, observation in kinds.items()}


def _within(harm: Mapping[str, float]) -> bool:
    return max(harm.values()) <= WORST_HARM and sum(harm.values()) <= MEAN_HARM * len(harm)
