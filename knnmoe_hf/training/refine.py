"""What may follow a build: keys collected again with the memory active, fewer rows, fewer layers.

Each choice is made on the last references, held out of the memories that are compared.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from knnmoe_hf.calibration.calibrate import Calibration, calibrate
from knnmoe_hf.calibration.held_out import HeldOut, hold_out
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.lookup.blocks import BLOCK, Allocate, in_memory
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import attached, disable_memory
from knnmoe_hf.models.gates import Gate, find_gates, gate_logits
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.data import collate
from knnmoe_hf.training.row_files import on_disk

logger = logging.getLogger(__name__)

_FOLDS = 4


@dataclass(frozen=True)
class Rekeying:
    """
    What a second pass came to.

    Attributes:
        kept: whether its keys are the memory's now.
        drift: by layer, mean squared distance between first and second key, in units of the layer's scale.
        nll_first, nll_second: of the held-out references, in nats per token.
    """

    kept: bool
    drift: dict[int, float]
    nll_first: float
    nll_second: float


def refine(
    model: nn.Module,
    memory: RoutingMemory,
    args: KNNMoETrainingArguments,
    ordinary: Mapping[str, Sequence[dict]],
    processes: Processes = ALONE,
) -> tuple[RoutingMemory, Rekeying | None, Calibration | None]:
    """
    What the arguments and the memory's confidence ask for after the build, in this order.

    Args:
        model: the memory's base model.
        memory: as built.
        args: of the build.
        ordinary: rows of ordinary text by kind, for `confidence="calibrated"`.
        processes: that have the same memory; they take turns at the batches that it is judged by.
    """
    asked, rekeying, calibration = memory.config.confidence, None, None
    batch_size = args.per_device_train_batch_size
    memory = replace(memory)
    if asked == "calibrated":
        memory.config.confidence = "context"  # until there is a calibration
    if args.rekey:
        memory, rekeying = rekeyed(model, memory, batch_size, processes, on_disk(Path(args.output_dir)))
    if args.max_rows is not None or args.min_gain is not None:
        memory = memory.select_rows(args.max_rows, args.min_gain)
    if args.merge_distance is not None:
        memory = memory.merge_duplicates(model, args.merge_distance)
    if args.num_layers is not None:
        memory = best_layers(model, memory, args.num_layers, batch_size, processes)
    memory.config.confidence = asked
    if asked == "calibrated":
        memory, calibration = calibrate(model, memory, ordinary, batch_size, processes)
    return memory, rekeying, calibration


def rekeyed(
    model: nn.Module,
    memory: RoutingMemory,
    batch_size: int = 8,
    processes: Processes = ALONE,
    allocate: Allocate = in_memory,
) -> tuple[RoutingMemory, Rekeying | None]:
    """
    A memory whose keys are what the gates see while a memory is active, if held-out references are the better for it.

    Deeper layers see inputs that mixed routing in earlier ones has changed, the keys of a build come from the frozen
    model. The references are run through in four parts, each with a memory of the other three.

    Args:
        model: the memory's base model.
        memory: with provenance; what `config.key_codec` loses of the inputs is lost for the drift, not for the keys.
        batch_size: examples per forward pass.
        processes: that have the same memory and take turns at the batches.
        allocate: makes what the gates' inputs are kept in.

    Returns:
        The memory with new keys or the one that was given, and what was found; None if too few references can be held
        out.
    """
    held = hold_out(memory)
    if held is None:
        logger.warning("%d rows hold too few examples to hold any out: the keys stay as they are", len(memory))
        return memory, None
    inputs = _second_inputs(model, memory, batch_size, processes, allocate)
    second = memory.with_inputs(model, inputs)
    gates = {gate.layer: gate for gate in find_gates(model)}
    drift = {layer: _drift(rows, inputs[layer], gates[layer]) for layer, rows in memory.layers.items()}
    nll = [_nll(model, candidate.take(held.rest), held, batch_size, processes) for candidate in (memory, second)]
    found = Rekeying(nll[1] < nll[0], drift, *nll)
    logger.info("second pass: %s", found)
    return second if found.kept else memory, found


def _drift(rows: LayerRows, x: Tensor, gate: Gate) -> float:
    """See `Rekeying.drift`, for a layer's second inputs x (N, d)."""
    moved = 0.0
    for some, codes in zip(x.split(BLOCK), rows.key_codes.split(BLOCK)):
        query = rows.encoder.query(some, gate_logits(gate, some))
        moved += (query - rows.encoder.floats(codes)).square().sum().item()
    return moved / len(x) / rows.scale


@torch.no_grad()
def _second_inputs(
    model: nn.Module, memory: RoutingMemory, batch_size: int, processes: Processes, allocate: Allocate
) -> dict[int, Tensor]:
    """(N, d) by layer: what the gates see at each row's token, with a memory of the other parts' examples."""
    known, taken = memory.provenance, itertools.count()
    found = {
        layer: allocate((len(memory), rows.hidden_size), torch.float32).zero_()
        for layer, rows in memory.layers.items()
    }
    tokens = known.tokens()
    for part in range(_FOLDS):
        names = list(tokens)[part::_FOLDS]
        inside = torch.isin(known.example_ids, torch.tensor(names))
        if not bool(inside.any()):
            continue
        with attached(model, memory.take(~inside)), evaluating(model):
            for start in range(0, len(names), batch_size):
                if processes.owner(next(taken)) != processes.index:
                    continue
                some = {name: tokens[name] for name in names[start : start + batch_size]}
                for layer, rows, x in _seen(model, memory, some):
                    found[layer][rows] = x
    for table in found.values():
        processes.all_reduce_bytes(table)
    return found


def _seen(
    model: nn.Module, memory: RoutingMemory, examples: dict[int, Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each layer, the rows (n,) of these examples and the gate's inputs (n, d) at their tokens."""
    known, seen = memory.provenance, {}
    rows = torch.isin(known.example_ids, torch.tensor(list(examples))).nonzero().squeeze(-1)
    place = {name: index for index, name in enumerate(examples)}
    batch = collate(
        [
            {"input_ids": ids.tolist(), "labels": ids.tolist(), "attention_mask": [1] * len(ids), "example_id": name}
            for name, ids in examples.items()
        ]
    )
    line = torch.tensor([place[name] for name in known.example_ids[rows].tolist()])
    where = line * batch["input_ids"].shape[1] + known.positions[rows]
    handles = [
        gate.module.register_forward_pre_hook(
            lambda _, args, layer=gate.layer: seen.__setitem__(layer, args[0].reshape(-1, args[0].shape[-1]))
        )
        for gate in find_gates(model)
        if gate.layer in memory.layers
    ]
    device = model.get_input_embeddings().weight.device
    try:
        call = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        model(**call, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer, x in seen.items():
        yield layer, rows, x[where.to(x.device)].float().cpu()


def best_layers(
    model: nn.Module, memory: RoutingMemory, count: int, batch_size: int = 8, processes: Processes = ALONE
) -> RoutingMemory:
    """
    The memory of the `count` layers that each alone gain most on held-out references.

    Args:
        model: the memory's base model.
        memory: with provenance.
        count: layers to keep.
        batch_size: examples per forward pass.
        processes: that have the same memory and take turns at the batches.

    Returns:
        A memory of those layers; the one that was given if it has no more, or if no reference can be held out.
    """
    held = hold_out(memory)
    if held is None or count >= len(memory.layers):
        return memory
    unseen = memory.take(held.rest)
    with disable_memory(model):
        base = score(model, held.rows, batch_size, processes=processes).mean_nll
    gains = {
        layer: base - _nll(model, _of_layers(unseen, [layer]), held, batch_size, processes) for layer in memory.layers
    }
    chosen = sorted(sorted(gains, key=gains.get, reverse=True)[:count])
    logger.info("gain of each layer alone on held-out references, nats per token: %s; kept %s", gains, chosen)
    return _of_layers(memory, chosen)


def _of_layers(memory: RoutingMemory, layers: list[int]) -> RoutingMemory:
    return replace(memory, layers={layer: memory.layers[layer] for layer in layers})


def _nll(model: nn.Module, memory: RoutingMemory, held: HeldOut, batch_size: int, processes: Processes) -> float:
    with attached(model, memory):
        return score(model, held.rows, batch_size, processes=processes).mean_nll
