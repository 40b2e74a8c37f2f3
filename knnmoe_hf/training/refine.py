"""What may follow a build: fewer rows, fewer layers, a calibration. Choices are made on held-out references."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from knnmoe_hf.calibration.background import BackgroundText
from knnmoe_hf.calibration.calibrate import calibrate_prepared
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.lookup.make import make_confidences
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.models.attach import AttachedMemory, prepare
from knnmoe_hf.models.hooks import Overrides, hooked, using_overrides
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
    Selects rows and layers and calibrates, as far as the arguments and the memory's confidence ask for it.

    Args:
        model: the memory's base model.
        memory: as built.
        args: of the build.
        background: background text by kind, for `confidence="calibrated"`.
        processes: that have the same memory; they take turns at the batches that it is judged by.

    Returns:
        The memory prepared for the model with the confidence that was asked for, and the calibration if there was one.
    """
    if args.max_rows is not None or args.min_gain is not None:
        memory = memory.select_rows(args.max_rows, args.min_gain)
    options, record = memory.config.retrieval_options(), None
    with hooked(model):
        prepared = prepare(model, memory, replace(options, confidence="rbf"))
        if args.num_layers is not None:
            prepared = best_layers(model, prepared, args.num_layers, args.per_device_train_batch_size, processes)
        if options.confidence == "calibrated":
            prepared, record = calibrate_prepared(
                model, prepared, background, args.per_device_train_batch_size, processes
            )
    layers = {layer: prepared.memory.layers[layer] for layer in prepared}
    return prepared.with_confidences(make_confidences(layers, options)), record


def best_layers(
    model: nn.Module, prepared: AttachedMemory, count: int, batch_size: int = 8, processes: Processes = ALONE
) -> AttachedMemory:
    """
    The memory of the `count` layers that each alone gain most on held-out references.

    Args:
        model: the memory's base model.
        prepared: a memory with provenance, prepared for the model.
        count: layers to keep.
        batch_size: examples per forward pass.
        processes: that have the same memory and take turns at the batches.

    Returns:
        A memory of those layers; the one that was given if it has no more, or if no reference can be held out.
    """
    memory, held = prepared.memory, hold_out(prepared.memory)
    if held is None or count >= len(prepared):
        return prepared
    rest, options = prepared.with_rows_of(memory.take(held.rest)), memory.config.retrieval_options()
    if options.confidence == "calibrated":  # there are no statistics yet
        options = replace(options, confidence="context")

    def mean_nll(layers: list[int]) -> float:
        confidences = make_confidences({layer: memory.layers[layer] for layer in layers}, options)
        with using_overrides(model, rest.with_confidences(confidences) if layers else Overrides({})):
            return score(model, held.rows, batch_size, processes=processes).mean_nll

    base = mean_nll([])
    gains = {layer: base - mean_nll([layer]) for layer in prepared}
    chosen = sorted(sorted(gains, key=gains.get, reverse=True)[:count])
    logger.info("gain of each layer alone on held-out references, nats per token: %s; kept %s", gains, chosen)
    fewer = replace(memory, layers={layer: memory.layers[layer] for layer in chosen})
    return prepared.with_confidences({layer: prepared[layer].confidence for layer in chosen}, fewer)
