"""Memories from memories: rows taken out, two joined. Each gives a new one and leaves the old as they are."""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import MemoryMismatchError, shown
from knnmoe_hf.lookup.blocks import Table
from knnmoe_hf.lookup.codecs import KeyEncoder
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.values import store_values
from knnmoe_hf.memory.encode import logits_of
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.models.fingerprint import same_gates
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.search.exact import TorchSearch

if TYPE_CHECKING:
    from knnmoe_hf.memory.memory import RoutingMemory

logger = logging.getLogger(__name__)


def remove_examples(memory: "RoutingMemory", example_ids: Iterable[int]) -> "RoutingMemory":
    """See `RoutingMemory.remove_examples`."""
    if memory.provenance is None:
        raise ValueError("this memory was saved without provenance, so its examples are unknown: build it anew.")
    unwanted, present = set(map(int, example_ids)), set(memory.provenance.example_ids.tolist())
    if missing := sorted(unwanted - present):
        raise ValueError(f"{shown(missing)} are no examples of this memory: its ids are {shown(sorted(present))}.")
    return _select(memory, ~_is_in(memory.provenance, unwanted))


def merge(memory: "RoutingMemory", other: "RoutingMemory") -> "RoutingMemory":
    """See `RoutingMemory.merge`."""
    _check_mergeable(memory, other)
    provenance = memory.provenance
    if provenance is not None:
        other = _without_shared_examples(other, provenance)
        provenance = provenance.joined(other.provenance)
    layers = {layer: _joined(rows, other.layers[layer], memory.config) for layer, rows in memory.layers.items()}
    merged = _with_rows(memory, layers, provenance)
    if provenance is None:  # which rows share an example is unknown, so distances cannot be measured anew
        merged.layers = {
            layer: replace(rows, distances=_stacked(mine.distances, theirs.distances), scale=scale)
            for layer, rows in merged.layers.items()
            for mine, theirs in [(memory.layers[layer], other.layers[layer])]
            for scale in [_mean_scale(memory, other, layer)]
        }
    return merged


def _stacked(mine: Tensor, theirs: Tensor) -> Tensor:
    """Distances of both, to as many neighbours as there are in either."""
    sides = [side for side in (mine, theirs) if len(side)] or [mine]
    width = min(side.shape[1] for side in sides)
    return torch.cat([side[:, :width] for side in sides])


def _joined(mine: LayerRows, theirs: LayerRows, config: KNNMoEConfig) -> LayerRows:
    """The rows of both in the encoding of the first."""
    codes, table = theirs.key_codes, theirs.values
    if not _same_tensors(mine.encoder, theirs.encoder):
        inputs = theirs.encoder.inputs(codes)
        encoder = mine.encoder
        codes = encoder.encode(inputs, inputs, codes.dtype)
    joined = torch.cat([mine.values.floats(), table.floats()])
    stored = store_values(joined, config.value_space, mine.values.codes.dtype, config.value_experts)
    return replace(mine, key_codes=torch.cat([mine.key_codes, codes]), values=stored, stats=None, source=None)


def _same_tensors(one: KeyEncoder, other: KeyEncoder) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def _mean_scale(memory: "RoutingMemory", other: "RoutingMemory", layer: int) -> float:
    rows = len(memory) + len(other)
    total = memory.layers[layer].scale * len(memory) + other.layers[layer].scale * len(other)
    return total / rows if rows else memory.layers[layer].scale


def _check_mergeable(memory: "RoutingMemory", other: "RoutingMemory") -> None:
    for name, mine in memory.origin.options.items():
        theirs = other.origin.options[name]
        if mine != theirs:
            raise MemoryMismatchError(f"memories of {name} {mine!r} and {theirs!r} do not merge: build both alike.")
    if list(memory.layers) != list(other.layers):
        described = f"{shown(list(memory.layers))} and {shown(list(other.layers))}"
        raise MemoryMismatchError(f"memories of layers {described} do not merge: build both for the same layers.")
    if (memory.provenance is None) != (other.provenance is None):
        raise MemoryMismatchError("one of the memories has no provenance: merge such as both have it or neither.")
    prints = [side.origin.base_model_fingerprint for side in (memory, other)]
    if None not in prints and not same_gates(*map(dict, prints)):
        raise MemoryMismatchError("the memories were built for different models: merge such as belong to one model.")


def _without_shared_examples(other: "RoutingMemory", mine: Provenance) -> "RoutingMemory":
    """`other` without the examples that both hold, and with free ids for those whose id is taken."""
    my_tokens, their_tokens = mine.tokens(), other.provenance.tokens()
    taken, theirs = set(mine.example_ids.tolist()), set(other.provenance.example_ids.tolist())
    shared = {
        i
        for i in taken & theirs
        if i in my_tokens and i in their_tokens and torch.equal(my_tokens[i], their_tokens[i])
    }
    clashes = sorted((taken & theirs) - shared)
    free = max(taken | theirs, default=-1) + 1
    new_ids = {old: free + step for step, old in enumerate(clashes)}
    if new_ids:
        logger.info("merging: %d examples of the other memory get new ids, from %d on", len(new_ids), free)
    kept = _select(other, ~_is_in(other.provenance, shared)) if shared else copy.copy(other)
    kept.provenance = kept.provenance.renumbered(new_ids)
    return kept


def _is_in(provenance: Provenance, examples: set[int]) -> Tensor:
    return torch.isin(provenance.example_ids, torch.tensor(sorted(examples), dtype=torch.int64))


def _select(memory: "RoutingMemory", keep: Tensor) -> "RoutingMemory":
    provenance = memory.provenance.select(keep) if memory.provenance is not None else None
    return _with_rows(memory, {layer: rows.select(keep) for layer, rows in memory.layers.items()}, provenance)


def _with_rows(
    memory: "RoutingMemory", layers: dict[int, LayerRows], provenance: Provenance | None
) -> "RoutingMemory":
    """`memory` with other rows, their distances measured anew."""
    edited = copy.copy(memory)
    edited.config = copy.deepcopy(memory.config)
    edited.origin = replace(memory.origin, reference_set_hash=None)
    edited.provenance = provenance
    rows = len(next(iter(layers.values())).key_codes)
    ids = provenance.example_ids if provenance is not None else torch.arange(rows)
    edited.layers = {layer: rows.measured(ids, memory.config) for layer, rows in layers.items()}
    return edited


def take(memory: "RoutingMemory", keep: Tensor) -> "RoutingMemory":
    """See `RoutingMemory.take`."""
    taken = copy.copy(memory)
    taken.provenance = memory.provenance.select(keep) if memory.provenance is not None else None
    rows = _as_slice(keep)
    taken.layers = {layer: stored.select(rows) for layer, stored in memory.layers.items()}
    return taken


def _as_slice(keep: Tensor) -> Tensor | slice:
    """A mask (N,) of rows that follow on each other as a slice, of which tensors need no copy."""
    first, count = int(keep.int().argmax()) if len(keep) else 0, int(keep.sum())
    return slice(first, first + count) if bool(keep[first : first + count].all()) else keep


def recoded(memory: "RoutingMemory", base_model: nn.Module, options: dict) -> "RoutingMemory":
    """See `RoutingMemory.recoded`."""
    config = KNNMoEConfig.from_dict(memory.config.saved() | options)
    built = memory.origin.options
    if config.value_space != built["value_space"]:
        raise ValueError(
            f"value_space={shown(config.value_space)} cannot be made of {built['value_space']!r} values: build the "
            "memory anew."
        )
    if built["key_codec"] == "logits" != config.key_codec:
        raise ValueError(f"key_codec={shown(config.key_codec)} cannot be made of logits: build the memory anew.")
    inputs = {layer: rows.encoder.inputs(rows.key_codes) for layer, rows in memory.layers.items()}
    edited = copy.copy(memory)
    edited.config = config
    edited.origin = replace(memory.origin, options={name: getattr(config, name) for name in built})
    return with_inputs(edited, base_model, inputs)


def with_inputs(memory: "RoutingMemory", base_model: nn.Module, inputs: Mapping[int, Table]) -> "RoutingMemory":
    """See `RoutingMemory.with_inputs`; inputs that already are the gate's logits stay what they are."""
    memory.check_model(base_model)
    gates = {gate.layer: gate for gate in find_gates(base_model)}
    ids = memory.provenance.example_ids if memory.provenance is not None else torch.arange(len(memory))
    edited = copy.copy(memory)
    edited.layers = {}
    for layer, rows in memory.layers.items():
        x = inputs[layer]
        logits = logits_of(gates[layer], x) if x.shape[1] == rows.hidden_size else x
        stored = LayerRows.encoded(x, logits, rows.values, ids, memory.config)
        edited.layers[layer] = replace(stored, hidden_size=rows.hidden_size)
    return edited


def select_rows(memory: "RoutingMemory", max_rows: int | None, min_gain: float | None) -> "RoutingMemory":
    """See `RoutingMemory.select_rows`."""
    known = memory.provenance
    if known is None or not bool(known.nll_before.any()):
        raise ValueError("the gains of this memory's rows are not recorded: build it anew, with provenance.")
    gain = known.nll_before - known.nll_after
    keep = torch.ones(len(gain), dtype=torch.bool) if min_gain is None else gain >= min_gain
    if max_rows is not None and int(keep.sum()) > max_rows:
        best = gain.masked_fill(~keep, float("-inf")).argsort(descending=True, stable=True)[:max_rows]
        keep = torch.zeros_like(keep).index_fill(0, best, True)
    return _select(memory, keep)


def merge_duplicates(memory: "RoutingMemory", base_model: nn.Module, distance: float) -> "RoutingMemory":
    """See `RoutingMemory.merge_duplicates`."""
    memory.check_model(base_model)
    top_k = {gate.layer: gate.top_k for gate in find_gates(base_model)}
    chosen = {
        layer: rows.decoded_values.topk(top_k[layer], dim=-1).indices.sort(dim=-1).values
        for layer, rows in memory.layers.items()
    }
    into = _duplicates(memory, chosen, distance)
    keep = into == torch.arange(len(into))
    counts = torch.zeros(len(into)).index_add_(0, into, torch.ones(len(into)))[keep]
    merged = _select(memory, keep)
    for layer, rows in memory.layers.items():
        values = rows.decoded_values
        means = torch.zeros_like(values).index_add_(0, into, values)[keep] / counts[:, None]
        table = store_values(means, memory.config.value_space, rows.values.codes.dtype, memory.config.value_experts)
        merged.layers[layer] = replace(merged.layers[layer], values=table)
    return merged


def _duplicates(memory: "RoutingMemory", chosen: dict[int, Tensor], distance: float, neighbors: int = 8) -> Tensor:
    """
    (N,) int64, the row that each row is merged into: itself, or an earlier one that is merged into none.

    Looks at each row's nearest ones in the last layer, whose keys have seen the most of a row's context; `chosen` are
    the experts (N, k) of each layer's values.
    """
    rows, last = len(memory), next(reversed(memory.layers.values()))
    if rows == 0:
        return torch.arange(0)
    near = TorchSearch(last.stored_keys, memory.config).search(last.decoded_keys, neighbors).rows  # (N, neighbors)
    same = torch.ones_like(near, dtype=torch.bool)
    for layer, stored in memory.layers.items():
        keys, experts = stored.decoded_keys, chosen[layer]
        for column, other in enumerate(near.T):
            close = (keys - keys[other]).square().sum(dim=-1) <= distance * stored.scale
            same[:, column] &= close & (experts == experts[other]).all(dim=-1)
    earlier, own = near, torch.arange(rows)
    candidate = torch.where(same & (earlier < own[:, None]), earlier, rows).amin(dim=1)  # the earliest, or `rows`
    first = candidate == rows
    kept_first = first[candidate.clamp_max(rows - 1)] & ~first
    return torch.where(kept_first, candidate, own)
