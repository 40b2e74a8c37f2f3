"""A memory from the rows of a build: encoded, measured, and bound to its model."""

import copy
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from knnmoe_hf.config import FIXED_AT_BUILD, KNNMoEConfig
from knnmoe_hf.fingerprint import fingerprint
from knnmoe_hf.memory import artefact
from knnmoe_hf.memory.manifest import Origin
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.rows import LayerRows
from knnmoe_hf.memory.storage import all_finite
from knnmoe_hf.routing import find_gates, gate_logits


def build_memory(
    config: KNNMoEConfig,
    keys: Mapping[int, Tensor],
    values: Mapping[int, Tensor],
    base_model: nn.Module,
    provenance: Provenance,
    tokenizer=None,
    **origin,
):
    """
    `RoutingMemory.from_rows` for rows known to fit the model, with full provenance; `origin` as in `Origin`.

    Raises:
        ValueError: if rows are not finite in the dtypes that the configuration asks for.
    """
    from knnmoe_hf.memory.memory import RoutingMemory

    config = copy.deepcopy(config)
    config.validate_retrieval()
    name = getattr(getattr(base_model, "config", None), "name_or_path", None) or None
    config.base_model_name_or_path = os.path.abspath(name) if name and os.path.isdir(name) else name
    config.base_model_revision = config.base_model_revision or artefact.cached_commit(name)
    config.layers = sorted(keys)
    inner = base_model.get_base_model() if hasattr(base_model, "get_base_model") else base_model
    gates = {gate.layer: gate for gate in find_gates(base_model)}
    layers = {}
    for layer in config.layers:
        x, value = (side[layer].detach().to("cpu", torch.float32) for side in (keys, values))
        rows = LayerRows.encoded(x, gate_logits(gates[layer], x), value, provenance.example_ids, config)
        if not all(map(all_finite, rows.tensors().values())):
            raise ValueError(
                f"keys[{layer}] in {config.key_dtype} or values[{layer}] in {config.value_dtype} are not finite: use "
                "key_dtype='bfloat16' for keys beyond float16, and drop other such rows."
            )
        layers[layer] = rows
    described = Origin(
        {name: getattr(config, name) for name in FIXED_AT_BUILD},
        type(inner).__name__,
        fingerprint(list(gates.values())),
        **origin,
    )
    return RoutingMemory(config, layers, described, provenance, tokenizer)
