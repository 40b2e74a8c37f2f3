"""Fits the constants of `confidence="calibrated"`: what the references look like to a memory, what ordinary text does,
and how far the memory may open in between.

Only reads the model: a pass over held-out references and ordinary text with the memory wide open, one with it closed.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from knnmoe_hf.calibration.background import prepare_background
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.observe import Observation, observe
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.evaluation.scores import score_kinds
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import attached
from knnmoe_hf.search import build_engine

logger = logging.getLogger(__name__)

MEAN_HARM, WORST_HARM = 0.004, 0.008
"""Nats per token that a calibrated memory may cost on ordinary text: in the mean of its kinds, and on any of them."""
# lower ones open on text that was not shown; the last is that of a memory that never opens
_THRESHOLDS = [round(0.54 + 0.04 * step, 2) for step in range(25)] + [2.0, 3.0, 5.0, 10.0, 100.0]
_UNUSUAL = 1.5
_WIDTH = 0.04
_RIDGE = 1e-3  # of windows of 256 tokens, the variance of what is unseen is 50 times this
_LEAST_GAP = 0.02  # between the stats of a layer that does not tell text apart, as a share of its own level


@dataclass(frozen=True)
class Calibration:
    """
    What was found.

    Attributes:
        threshold: the lowest found to keep the bounds, on the way from ordinary text (0) to the references (1).
        gain: what the memory is expected to gain on held-out references, in nats per token.
        open_gain: the same of a memory that is always open.
        harm: what it costs, by kind of ordinary text.
        excluded: kinds of text that the open memory helps on, so that they count as its domain.
    """

    threshold: float
    gain: float
    open_gain: float
    harm: dict[str, float]
    excluded: list[str]


def calibrate(
    model: nn.Module,
    memory: RoutingMemory,
    ordinary: Mapping[str, Sequence[dict]],
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> tuple[RoutingMemory, Calibration | None]:
    """
    Fits each layer's stats and the threshold of `confidence="calibrated"`.

    The last references are held out for the fit (they stay in the memory); a few before them are left out as well, as
    neighbours in a data set are often of one document.

    Args:
        model: the memory's base model; its weights are only read, memories attached to it are out of force meanwhile.
        memory: with provenance.
        ordinary: text by kind on which the memory should do nothing, see `knnmoe_hf.ordinary.prepare_background`; rows
            of text need the memory's tokenizer.
        batch_size: examples per forward pass.
        processes: that take turns at the batches; all of them call this alike and find the same.

    Returns:
        A memory with `stats`, and what was found; the memory as it is and None, with a warning, if there are too few
        references to hold any out or no ordinary text is left that the memory does not help on.
    """
    # held, so that each time the memory is attached below finds them again
    indexes = [build_engine(rows.stored_keys, memory.config) for rows in memory.layers.values()]
    held, heard = hold_out(memory), {}
    if held is not None:
        prepared = prepare_background(ordinary, memory.tokenizer, None)
        heard = observe(model, memory, prepared, batch_size, processes)
    if not heard:
        what = "ordinary text" if held is not None else "references that can be held out"
        logger.warning("there are no %s to calibrate by: confidence='calibrated' falls back to 'context'", what)
        return memory, None
    own = observe(model, memory.take(held.rest), {"own": held.rows}, batch_size, processes)["own"]
    excluded = [kind for kind, text in heard.items() if text.rise.mean() <= 0]
    kinds = {kind: text for kind, text in heard.items() if kind not in excluded}
    if not kinds:
        said = "the memory helps on all ordinary text (%s): confidence='calibrated' falls back to 'context'"
        logger.warning(said, shown(excluded))
        return memory, None
    stats = _levels(own, list(kinds.values()), memory)
    first = next((index for index, at in enumerate(_THRESHOLDS) if _within(_expected(_at(stats, at), kinds))), -1)
    for threshold in _THRESHOLDS[first:]:
        fitted = _with(memory, stats := _at(stats, threshold))
        after = _measured(model, fitted, {kind: prepared[kind] for kind in kinds}, batch_size, processes)
        harm = {kind: after[kind] - kinds[kind].before for kind in kinds}
        if _within(harm):
            break
    found = Calibration(threshold, -own.change(_gate(stats, own)), -own.change(), harm, excluded)
    logger.info("calibrated: %s", found)
    if threshold > _UNUSUAL:
        said = "the memory hardly tells its references from ordinary text: of %.4f nats of gain it keeps %.4f"
        logger.warning(said, found.open_gain, found.gain)
    del indexes
    return fitted, found


def _levels(own: Observation, kinds: list[Observation], memory: RoutingMemory) -> dict[int, CalibrationStats]:
    """Between the references and the kind of ordinary text that is most like them, by layer; the threshold is 0."""
    stats = {}
    measured = {name: float(getattr(memory.config, name)) for name in ("gamma", "half_life", "num_neighbors")}
    for layer, series in own.means.items():
        nearest = max(kinds, key=lambda kind: kind.means[layer].mean().item())
        level, drift, spread = _line(own, layer)
        ordinary, background_drift, ordinary_spread = _line(nearest, layer)
        least = max(_LEAST_GAP * series.mean().item(), 1e-6)
        gap = max(series.mean().item() - nearest.means[layer].mean().item(), least)
        weight = max(gap * gap / max(spread + ordinary_spread, 1e-9), 1e-6)  # how well it tells the two apart
        warmup = max(own.warmup.min(), nearest.warmup.min()).item()
        later, first = (max(level - ordinary + (drift - background_drift) * place, least) for place in (warmup, 1.0))
        change = (first - later) / (1 - warmup)  # of the gap, from what both were fitted on to where a sequence begins
        stats[layer] = CalibrationStats(
            reference_mean=level,
            background_mean=level - later + change * warmup,
            weight=weight,
            threshold=0.0,
            width=_WIDTH,
            scale=memory.layers[layer].scale,
            reference_drift=drift,
            background_drift=drift - change,
            min_warmup=warmup,
            open_shift=own.falls[layer],
            **measured,
        )
    return stats


def _line(heard: Observation, layer: int) -> tuple[float, float, float]:
    """
    The running similarity as level + drift * warmup, and the variance that is left.

    By least squares with a ridge: where targets come late, `warmup` hardly varies and says nothing of a beginning.
    """
    series, warmup = heard.means[layer].double(), heard.warmup.double()
    moved = warmup - warmup.mean()
    drift = (moved @ series) / (moved @ moved + _RIDGE * len(series))
    left = series - series.mean() - drift * moved
    return (series.mean() - drift * warmup.mean()).item(), drift.item(), left.square().mean().item()


def _gate(stats: dict[int, CalibrationStats], heard: Observation) -> Tensor:
    """(n,) how far the memory opens for each token, in the mean of its layers."""
    evidence, weight, gates = 0.0, 0.0, []
    for layer, level in stats.items():
        evidence = evidence + level.weight * level.evidence(heard.means[layer], heard.warmup)
        weight += level.weight
        gates.append(level.opening(evidence / weight))
    return torch.stack(gates).mean(dim=0)


def _with(memory: RoutingMemory, stats: dict[int, CalibrationStats]) -> RoutingMemory:
    return replace(
        memory, layers={layer: replace(rows, stats=stats[layer]) for layer, rows in memory.layers.items()}
    )


def _at(stats: dict[int, CalibrationStats], threshold: float) -> dict[int, CalibrationStats]:
    return {layer: replace(level, threshold=threshold) for layer, level in stats.items()}


def _expected(stats: dict[int, CalibrationStats], kinds: Mapping[str, Observation]) -> dict[str, float]:
    """Harm by kind of ordinary text, as far as what an open memory does tells it."""
    return {kind: text.change(_gate(stats, text)) for kind, text in kinds.items()}


def _within(harm: Mapping[str, float]) -> bool:
    return max(harm.values()) <= WORST_HARM and sum(harm.values()) <= MEAN_HARM * len(harm)


def _measured(
    model: nn.Module,
    memory: RoutingMemory,
    texts: Mapping[str, Sequence[dict]],
    batch_size: int,
    processes: Processes,
) -> dict[str, float]:
    """Mean NLL of each kind with a calibrated memory."""
    tried = replace(memory)
    tried.config.confidence = "calibrated"
    with attached(model, tried):
        scores = score_kinds(model, texts, batch_size, processes)
    return {kind: found.mean_nll for kind, found in scores.items()}
