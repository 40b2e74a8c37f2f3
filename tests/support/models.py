"""Tiny real models of each family, and memories of random rows for them."""

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.models.gates import find_gates

PLAIN = dict(key_codec="raw", key_dtype="float32", value_dtype="float32", value_experts=None, confidence="rbf")
"""The paper's own form: nothing is lost in storage, and each token's confidence is its own."""

FAMILIES = ("olmoe", "qwen3_moe", "gpt_oss")
_SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


def tiny_model(family: str, seed: int = 0, **options):
    """A randomly initialised two-layer model with 8 experts, top-2, in float32 and eval mode."""
    torch.manual_seed(seed)
    sizes = _SIZES | options
    if family == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**({"intermediate_size": 16, "num_experts": 8} | sizes)))
    elif family == "qwen3_moe":
        more = dict(intermediate_size=32, moe_intermediate_size=16, num_experts=8, head_dim=8, norm_topk_prob=True)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(more | sizes)))
    else:
        more = dict(intermediate_size=16, num_local_experts=8, head_dim=8, sliding_window=8)
        more["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        model = GptOssForCausalLM(GptOssConfig(**(more | sizes)))
    for parameter in model.parameters():  # the default initialisation is too small for routing to matter
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model.eval()


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

    In the paper's own form unless `options` say otherwise.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    keys = gate_inputs(model, torch.randint(vocabulary, (1, rows), generator=generator))
    config = KNNMoEConfig(**(PLAIN | {"num_neighbors": 4, "gamma": 0.3} | options))
    values = {g.layer: 2 * torch.randn(rows, g.num_experts, generator=generator) for g in find_gates(model)}
    if config.value_space == "assignment":
        values = {layer: table.softmax(-1) for layer, table in values.items()}
    return RoutingMemory.from_rows(config, {i: x.float() for i, x in keys.items()}, values, model)
