"""Memories from memories: rows taken out, two joined. Each gives a new one and leaves the old as they are."""

import copy
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnmoe_hf.errors import MemoryMismatchError, shown
from knnmoe_hf.fingerprint import same_gates
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.scale import fit_scale

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
    tables = {
        layer: (torch.cat([rows.keys, other.layers[layer].keys]), torch.cat([rows.values, other.layers[layer].values]))
        for layer, rows in memory.layers.items()
    }
    merged = _with_rows(memory, tables, provenance)
    if provenance is None:  # which rows share an example is unknown, so a scale cannot be fitted to them
        merged.layers = {
            layer: replace(rows, scale=_mean_scale(memory, other, layer)) for layer, rows in merged.layers.items()
        }
    return merged


def _mean_scale(memory: "RoutingMemory", other: "RoutingMemory", layer: int) -> float:
    rows = len(memory) + len(other)
    total = memory.layers[layer].scale * len(memory) + other.layers[layer].scale * len(other)
    return total / rows if rows else memory.layers[layer].scale


def _check_mergeable(memory: "RoutingMemory", other: "RoutingMemory") -> None:
    for name in ("value_space", "key_dtype"):
        mine, theirs = getattr(memory.origin, name), getattr(other.origin, name)
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
    tables = {layer: (rows.keys[keep], rows.values[keep]) for layer, rows in memory.layers.items()}
    return _with_rows(memory, tables, provenance)


def _with_rows(
    memory: "RoutingMemory", tables: dict[int, tuple[Tensor, Tensor]], provenance: Provenance | None
) -> "RoutingMemory":
    """`memory` with other rows: keys and values of each layer."""
    edited = copy.copy(memory)
    edited.config = copy.deepcopy(memory.config)
    edited.origin = replace(memory.origin, reference_set_hash=None)
    edited.provenance = provenance
    rows = len(next(iter(tables.values()))[0])
    ids = provenance.example_ids if provenance is not None else torch.arange(rows)
    k, max_bytes = memory.config.num_neighbors, memory.config.search_max_bytes
    edited.layers = {
        layer: replace(memory.layers[layer], keys=keys, values=values, scale=fit_scale(keys, ids, k, max_bytes))
        for layer, (keys, values) in tables.items()
    }
    return edited
