"""Which ways of recall a calibration fits, and what it is fitted with."""

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
    """A memory made ready to recall next tokens too; None if it knows none, or if the model cannot mix them."""
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
    able: AttachedMemory,
    see: Callable[[Observation, float | None], Seen],
    references: Observation,
    background: Mapping[str, Observation],
    harm: Callable[[AttachedMemory], Mapping[str, float]],
    bounds: Bounds,
) -> dict[str, RecallFit]:
    """
    What is fitted for each way of recall but routing alone, which is calibrated before.

    With `recall="next_tokens"` the harm is known exactly without running the model. With `"both"` it is measured, and
    the routing may open later than it does alone, or never, so that there is room for tokens within the bounds: of the
    thresholds with which the memory gains nearly the most, it is the latest.

    Args:
        able: the memory with calibrated routing, able to recall next tokens.
        see: what is known of observed text, with routing that opens at a threshold, or (None) without any.
        references: observation of held-out references, with votes.
        background: of background text by kind, likewise.
        harm: of a memory on the background text, measured; by kind.
        bounds: of the harm.
    """
    num_voters, record = num_voters_of(able.options), able.memory.calibration
    options = replace(able.options, recall="both", next_token_weight=None, next_token_temperature=None)

    def fitted(threshold: float | None, routing_harm: Mapping[str, float] | None = None) -> RecallFit:
        others = {kind: see(observed, threshold) for kind, observed in background.items()}
        fit = fit_next_tokens(see(references, threshold), others, num_voters, bounds, routing_harm)
        return replace(fit, routing_threshold=threshold)

    def measured(fit: RecallFit) -> RecallFit:
        memory = replace(able.memory, calibration=replace(record, fits={"both": fit}))
        return replace(fit, harm=dict(harm(able.with_options(options, memory))))

    alone = fitted(None)
    never = replace(alone, routing_threshold=NEVER)
    later = [fitted(record.threshold + more) for more in _LATER]
    tried = [fit for fit in (fitted(record.threshold, record.harm), *later) if within(fit.harm, bounds)]
    while tried:
        enough = _ENOUGH * max(fit.gain for fit in tried)
        best = max((fit for fit in tried if fit.gain >= enough), key=lambda fit: fit.routing_threshold)
        if best.gain < never.gain:
            break
        if within((found := measured(best)).harm, bounds):
            return {"next_tokens": alone, "both": found}
        tried = [fit for fit in tried if fit.routing_threshold > best.routing_threshold]
    return {"next_tokens": alone, "both": never}


def log_fits(fits: Mapping[str, RecallFit]) -> None:
    """Logs what was fitted."""
    for recall, fit in fits.items():
        said = "recall=%r: weight %.2f, temperature %.2f, threshold %.2f, expected gain %.4f nats, harm %s"
        numbers = (fit.next_token_weight, fit.next_token_temperature, fit.threshold, fit.gain, fit.harm)
        logger.info(said, recall, *numbers)
