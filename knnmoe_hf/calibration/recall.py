"""Which ways of recall a calibration fits, and what it is fitted with."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from knnmoe_hf.calibration.next_tokens import Bounds, Seen, fit_next_tokens, measured_within
from knnmoe_hf.calibration.observe import Observation
from knnmoe_hf.errors import MemoryMismatchError, UnsupportedModelError
from knnmoe_hf.lookup.next_tokens import voters_of
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.logits_probe import check_vocabulary, probe_logits

logger = logging.getLogger(__name__)


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
    see: Callable[[Observation, bool], Seen],
    references: Observation,
    background: Mapping[str, Observation],
    harm: Callable[[AttachedMemory], Mapping[str, float]],
    bounds: Bounds,
) -> dict[str, RecallFit]:
    """
    What is fitted for each way of recall but routing alone, which is calibrated before.

    With `recall="next_tokens"` the harm is known exactly without running the model, with `"both"` it is measured.

    Args:
        able: the memory with calibrated routing, able to recall next tokens.
        see: what is known of observed text, with the memory changing the routing or not.
        references: observation of held-out references, with votes.
        background: of background text by kind, likewise.
        harm: of a memory on the background text, measured; by kind.
        bounds: of the harm.
    """
    voters, record = voters_of(able.options), able.memory.calibration
    options = replace(able.options, recall="both", next_token_weight=None, next_token_temperature=None)

    def measure(fit: RecallFit) -> Mapping[str, float]:
        return harm(able.with_options(options, replace(able.memory, calibration=replace(record, fits={"both": fit}))))

    def seen(routes: bool) -> tuple[Seen, dict[str, Seen]]:
        return see(references, routes), {kind: see(observed, routes) for kind, observed in background.items()}

    own, others = seen(True)
    both = fit_next_tokens(own, others, voters, bounds, record.harm)
    both = measured_within(both, own, measure, bounds, record.harm)
    return {"next_tokens": fit_next_tokens(*seen(False), voters, bounds), "both": both}


def log_fits(fits: Mapping[str, RecallFit]) -> None:
    """Logs what was fitted."""
    for recall, fit in fits.items():
        said = "recall=%r: weight %.2f, temperature %.2f, threshold %.2f, expected gain %.4f nats, harm %s"
        numbers = (fit.next_token_weight, fit.next_token_temperature, fit.threshold, fit.gain, fit.harm)
        logger.info(said, recall, *numbers)
