"""Steps after a build: dropping rows, dropping layers, calibration, verdict. All but the first hold out references."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from knnmoe_hf.calibration.background import BackgroundText
from knnmoe_hf.calibration.calibrate import calibrate_prepared
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.verdict import measure_verdict
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.hooks import hooked, using_overrides
from knnmoe_hf.models.logits_probe import probe_for
from knnmoe_hf.training.arguments import KNNMoETrainingArguments

logger = logging.getLogger(__name__)


def refine(
    model: nn.Module,
    memory: RoutingMemory,
    args: KNNMoETrainingArguments,
    background: Mapping[str, BackgroundText],
    processes: Processes = ALONE,
) -> tuple[AttachedMemory, CalibrationRecord | None]:
    """
    Selects rows and layers as the arguments say, calibrates the memory if its confidence is `"calibrated"`, and
    measures the verdict on it.

    Args:
        model: the memory's base model.
        memory: a memory that was just built.
        args: arguments of the build: `max_rows`, `min_gain`, `num_layers` and the batch size.
        background: background text by kind, for `confidence="calibrated"` and the verdict.
        processes: share the batches of held-out and background text; each must have the same memory.

    Returns:
        The memory with its verdict, prepared for the model with the confidence of its config (`"context"` where the
        calibration falls back to it), and the record of its calibration if any.
    """
    references, size = memory.provenance, args.per_device_train_batch_size
    if args.max_rows is not None or args.min_gain is not None:
        memory = memory.select_rows(args.max_rows, args.min_gain)
    options, record, obstacle = memory.config.retrieval_options(), None, None
    with hooked(model):
        # built from this model just now, so its fingerprint is not compared again
        probed = probe_for(model, memory, options.recall)
        prepared = AttachedMemory.of(memory, probed, replace(options, confidence="rbf", recall="routing"))
        if args.num_layers is not None:
            prepared = best_layers(model, prepared, args.num_layers, size, processes)
        if options.confidence == "calibrated":
            prepared, record, obstacle = calibrate_prepared(model, prepared, background, size, processes)
        used = options.confidence if obstacle is None else "context"
        options = replace(options, layers=prepared.memory.config.layers, confidence=used)
        prepared = prepared.with_options(options)
        verdict, measured = measure_verdict(model, prepared, background, size, processes, references, obstacle)
    card_data = replace(prepared.memory.card_data, measured=measured)
    prepared.memory = replace(prepared.memory, verdict=verdict, card_data=card_data)
    return prepared, record


def best_layers(
    model: nn.Module, prepared: AttachedMemory, count: int, batch_size: int = 8, processes: Processes = ALONE
) -> AttachedMemory:
    """
    Keeps the `count` layers that reduce the NLL of held-out references most when each is used alone.

    Args:
        model: the memory's base model.
        prepared: a memory with provenance, prepared for the model.
        count: layers to keep.
        batch_size: examples per forward pass.
        processes: share the batches; each must have the same memory.

    Returns:
        The memory of those layers; `prepared` itself if it has no more layers, or if no reference can be held out.
    """
    memory, held = prepared.memory, hold_out(prepared.memory)
    if held is None or count >= len(prepared):
        return prepared
    rest = prepared.with_rows_of(memory.take(held.rest))
    options = replace(memory.config.retrieval_options(), recall="routing")
    if options.confidence == "calibrated":  # statistics are fitted later
        options = replace(options, confidence="context")

    def of_layers(whole: AttachedMemory, layers: list[int]) -> AttachedMemory:
        chosen = {layer: whole.memory.layers[layer] for layer in layers}
        return whole.with_options(options, replace(whole.memory, layers=chosen))

    def mean_nll(overrides: Overrides) -> float:
        with using_overrides(model, overrides):
            return score(model, held.rows, batch_size, processes=processes).mean_nll

    base = mean_nll(Overrides({}))
    gains = {layer: base - mean_nll(of_layers(rest, [layer])) for layer in prepared}
    kept = sorted(sorted(gains, key=gains.get, reverse=True)[:count])
    logger.info(
        "gain of each layer alone on held-out references, in nats per token: %s; keeping layers %s", gains, kept
    )
    return of_layers(prepared, kept)
