"""Tiny real models of each family, and memories of random rows for them."""

import torch

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.models.gates import find_gates
from tests.support.families import family_model

PLAIN = dict(key_codec="raw", key_dtype="float32", value_dtype="float32", value_experts=None, confidence="rbf")
"""The paper's own form: nothing is lost in storage, and each token's confidence is its own."""

FAMILIES = ("olmoe", "qwen3_moe", "gpt_oss")
tiny_model = family_model


def gate_inputs(model, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """By layer, what each gate sees of ids (1, S): (S, d)."""
    seen, handles = {}, []
    for gate in find_gates(model):
        handles.append(gate.module.register_forward_hook(lambda _, a, o, i=gate.layer: seen.update({i: a[0]})))
    with torch.no_grad():
        model(input_ids=ids.to(model.device))
    for handle in handles:
        handle.remove()
    return {layer: x.reshape(ids.shape[1], -1) for layer, x in seen.items()}


def random_memory(model, rows: int = 40, seed: int = 1, **options) -> RoutingMemory:
    """
    Random rows whose keys are gate inputs of the model, so that confidences are neither 0 nor 1.

    In the paper's own form unless `options` say otherwise; with random next tokens if they recall any.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    keys = gate_inputs(model, torch.randint(vocabulary, (1, rows), generator=generator))
    config = KNNMoEConfig(**(PLAIN | {"num_neighbors": 4, "gamma": 0.3} | options))
    values = {g.layer: 2 * torch.randn(rows, g.num_experts, generator=generator) for g in find_gates(model)}
    if config.value_space == "assignment":
        values = {layer: table.softmax(-1) for layer, table in values.items()}
    next_tokens = torch.randint(vocabulary, (rows,), generator=generator) if config.recall != "routing" else None
    keys = {layer: x.float() for layer, x in keys.items()}
    return RoutingMemory.from_rows(config, keys, values, model, next_tokens=next_tokens)
