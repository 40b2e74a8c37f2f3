"""Fits the recall of next tokens once the routing is calibrated: without routing, and together with it."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from knnmoe_hf.calibration.next_tokens import Bounds, Seen, fit_next_tokens, within
from knnmoe_hf.calibration.observe import Observation
from knnmoe_hf.errors import MemoryMismatchError, UnsupportedModelError
from knnmoe_hf.lookup.next_tokens import num_voters_of
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.logits_probe import check_vocabulary, probe_logits

logger = logging.getLogger(__name__)

NEVER = 100.0
"""A threshold at which a memory never opens."""
_LATER = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5)  # than routing alone
_ENOUGH = 0.98  # of the most gain


def able_to_recall(model: nn.Module, prepared: AttachedMemory) -> AttachedMemory | None:
    """The memory prepared to recall next tokens too; None if it has none, or if the model cannot mix them in."""
    known = prepared.memory.next_tokens
    if known is None or not len(known):
        return None
    probed = prepared.model
    if probed.logits is None:
        try:
            probed = replace(probed, logits=probe_logits(model))
            check_vocabulary(known, probed.logits)
        except (UnsupportedModelError, MemoryMismatchError) as error:
            logger.info("the recall of next tokens is not calibrated: %s", error)
            return None
    return AttachedMemory(prepared.memory, probed, prepared, prepared.options)


def fit_recalls(
    prepared: AttachedMemory,
    see: Callable[[Observation, float | None], Seen],
    references: Observation,
    background: Mapping[str, Observation],
    measure: Callable[[RecallFit], tuple[float, Mapping[str, float]]],
    bounds: Bounds,
) -> dict[str, RecallFit]:
    """
    What is fitted for each way of recall but routing alone, which is calibrated before.

    With `recall="next_tokens"` gain and harm are known exactly without running the model. With `"both"` they are
    measured, as routing that is open moves the last layer's queries away from the keys that tokens are recalled by.
    There the routing may open later than it does alone, or never, so that there is room for tokens within the bounds:
    of the thresholds with which the memory is expected to gain nearly the most, it is the latest that does not gain
    less than tokens alone.

    Args:
        prepared: the memory with calibrated routing, able to recall next tokens.
        see: what is known of observed text, with routing that opens at a threshold, or (None) without any.
        references: observation of held-out references, with votes.
        background: of background text by kind, likewise.
        measure: what a fit of `"both"` gains on the held-out references, and its harm on background text, by kind.
        bounds: of the harm.
    """
    num_voters, record = num_voters_of(prepared.options), prepared.memory.calibration

    def fitted(threshold: float | None, routing_harm: Mapping[str, float] | None = None) -> RecallFit:
        others = {kind: see(observed, threshold) for kind, observed in background.items()}
        fit = fit_next_tokens(see(references, threshold), others, num_voters, bounds, routing_harm)
        return replace(fit, routing_threshold=threshold)

    def measured(fit: RecallFit) -> RecallFit:
        gain, harm = measure(fit)
        return replace(fit, gain=gain, harm=dict(harm))

    alone = fitted(None)
    never = replace(alone, routing_threshold=NEVER)
    later = [fitted(record.threshold + more) for more in _LATER]
    tried = [fit for fit in (fitted(record.threshold, record.harm), *later) if within(fit.harm, bounds)]
    while tried:
        enough = _ENOUGH * max(fit.gain for fit in tried)
        best = max((fit for fit in tried if fit.gain >= enough), key=lambda fit: fit.routing_threshold)
        if best.gain < never.gain:
            break
        found = measured(best)
        if within(found.harm, bounds) and found.gain >= never.gain:
            return {"next_tokens": alone, "both": found}
        tried = [fit for fit in tried if fit.routing_threshold > best.routing_threshold]
    return {"next_tokens": alone, "both": never}


def with_fit(prepared: AttachedMemory, fit: RecallFit) -> AttachedMemory:
    """A memory that is able to recall next tokens, with `recall="both"` and this fit."""
    options = replace(prepared.options, recall="both", next_token_weight=None, next_token_temperature=None)
    record = replace(prepared.memory.calibration, fits={"both": fit})
    return prepared.with_options(options, replace(prepared.memory, calibration=record))


def log_fits(fits: Mapping[str, RecallFit]) -> None:
    """Logs what was fitted."""
    for recall, fit in fits.items():
        said = "recall=%r: weight %.2f, temperature %.2f, threshold %.2f, expected gain %.4f nats, harm %s"
        numbers = (fit.next_token_weight, fit.next_token_temperature, fit.threshold, fit.gain, fit.harm)
        logger.info(said, recall, *numbers)
