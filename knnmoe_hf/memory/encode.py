"""A memory from the rows of a build: encoded, measured, and bound to its model."""

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.lookup.blocks import Allocate, Derived, Table, in_memory
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.options import FIXED_AT_BUILD
from knnmoe_hf.memory.folder import cached_commit
from knnmoe_hf.memory.manifest import Origin
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.storage import all_finite
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import Gate, find_gates, gate_logits

if TYPE_CHECKING:
    from knnmoe_hf.memory.memory import RoutingMemory


def build_memory(
    config: KNNMoEConfig,
    keys: Mapping[int, Table],
    values: Mapping[int, Table],
    base_model: nn.Module,
    provenance: Provenance,
    tokenizer=None,
    **origin,
) -> "RoutingMemory":
    """
    `RoutingMemory.from_rows` for rows known to fit the model, with full provenance; `origin` as in `Origin`.

    Raises:
        ValueError: if rows are not finite in the dtypes that the configuration asks for.
    """
    config.retrieval_options()
    layers = encode_layers(config, keys, values, base_model, provenance.example_ids)
    return assemble(config, layers, base_model, provenance, tokenizer, **origin)


def encode_layers(
    config: KNNMoEConfig,
    keys: Mapping[int, Table],
    values: Mapping[int, Table],
    base_model: nn.Module,
    example_ids: Tensor,
    allocate: Allocate = in_memory,
) -> dict[int, LayerRows]:
    """
    Rows as a memory stores them, layer by layer, of which only a block is in memory at once.

    Args:
        config: says how they are stored.
        keys: `{layer: (N, d)}`, gate inputs; values: `{layer: (N, E)}`; both in any float dtype.
        base_model: the model that the rows belong to.
        example_ids: (N,) int64.
        allocate: makes what the rows are stored in.

    Raises:
        ValueError: if rows are not finite in the dtypes that the configuration asks for.
    """
    gates, layers = {gate.layer: gate for gate in find_gates(base_model)}, {}
    for layer, x in keys.items():
        rows = LayerRows.encoded(x, logits_of(gates[layer], x), values[layer], example_ids, config, allocate)
        if not all(map(all_finite, rows.tensors().values())):
            raise ValueError(
                f"keys[{layer}] in {config.key_dtype} or values[{layer}] in {config.value_dtype} are not finite: use "
                "key_dtype='bfloat16' for keys beyond float16, and drop other such rows."
            )
        layers[layer] = rows
    return layers


def logits_of(gate: Gate, x: Table) -> Table:
    """The gate's own logits (N, E) float32 for inputs (N, d)."""
    return Derived(x, gate.num_experts, lambda some: gate_logits(gate, some.detach().to("cpu", torch.float32)))


def assemble(
    config: KNNMoEConfig,
    layers: Mapping[int, LayerRows],
    base_model: nn.Module,
    provenance: Provenance,
    tokenizer=None,
    **origin,
) -> "RoutingMemory":
    """A memory of encoded rows, bound to the model; `origin` as in `Origin`."""
    from knnmoe_hf.memory.memory import RoutingMemory

    config = copy.deepcopy(config)
    name = getattr(getattr(base_model, "config", None), "name_or_path", None) or None
    config.base_model_name_or_path = os.path.abspath(name) if name and os.path.isdir(name) else name
    config.base_model_revision = config.base_model_revision or cached_commit(name)
    config.layers = sorted(layers)
    inner = base_model.get_base_model() if hasattr(base_model, "get_base_model") else base_model
    described = Origin(
        {name: getattr(config, name) for name in FIXED_AT_BUILD},
        type(inner).__name__,
        fingerprint(find_gates(base_model)),
        **origin,
    )
    return RoutingMemory(config, layers, described, provenance, tokenizer)
