"""
How many bytes a memory of a model would take, computed from the model's configuration alone.

Only the command line imports this module. It makes models, so it imports transformers and `knnmoe_hf.models`.
"""

import math
from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GptOssConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.layer import SAMPLE, specification
from knnmoe_hf.memory import next_tokens
from knnmoe_hf.models.gates import Gate, find_gates, select_gates

PUBLISHED: dict[str, PreTrainedConfig] = {
    "allenai/OLMoE-1B-7B-0924": OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
    ),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "openai/gpt-oss-20b": GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
}
"""Configurations of released models, copied from their published `config.json`, so that a plan needs no network."""


@dataclass(frozen=True)
class Plan:
    """
    Sizes of a memory that is not built yet.

    Attributes:
        gates: of the layers that would get rows.
        tokens: rows in each layer.
        key_bytes, value_bytes: `{layer: bytes}`, codecs included.
    """

    gates: list[Gate]
    tokens: int
    key_bytes: dict[int, int]
    value_bytes: dict[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, without search indexes and provenance (20 bytes a row and 4 bytes a token)."""
        return sum(self.key_bytes.values()) + sum(self.value_bytes.values())

    @property
    def next_token_bytes(self) -> int:
        """Bytes of the tokens that follow the rows, where they are saved without the text."""
        kinds = next_tokens.specification(self.tokens).values()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)


def plan_memory(name_or_path: str, tokens: int, config: KNNMoEConfig) -> Plan:
    """
    The bytes of a memory with that many rows; the model is made on the meta device, so no weight is loaded.

    Args:
        name_or_path: one of `PUBLISHED`, or a folder or repository with a `config.json`.
        tokens: reference tokens, that is rows in each layer.
        config: how its rows would be stored, and for which layers.

    Raises:
        ValueError: if `tokens` is negative, `config` names a layer without a gate, or `name_or_path` is a memory.
        UnsupportedModelError: if a memory cannot be attached to the model.
    """
    if tokens < 0:
        raise ValueError(f"tokens={tokens} is not allowed: use a number of at least 0.")
    model_config = PUBLISHED.get(name_or_path) or AutoConfig.from_pretrained(name_or_path)
    gates = select_gates(gates_of(model_config, name_or_path), config.layers)
    keys, values = {}, {}
    for gate in gates:
        sizes = (tokens, gate.hidden_size, gate.num_experts, (min(tokens, SAMPLE), config.num_neighbors))
        for name, (shape, dtype) in specification(*sizes, config.options()).items():
            table = values if name.startswith("values.") else keys
            table[gate.layer] = table.get(gate.layer, 0) + math.prod(shape) * dtype.itemsize
    return Plan(gates, tokens, keys, values)


def gates_of(config: PreTrainedConfig, name: str) -> list[Gate]:
    """
    The gates of a model, on the meta device: their sizes, without a weight.

    Args:
        config: of the model.
        name: of the model, for messages.

    Raises:
        ValueError: if it is a memory.
        UnsupportedModelError: if a memory cannot be attached to the model.
    """
    if isinstance(config, KNNMoEConfig):
        base = shown(config.base_model_name_or_path)
        raise ValueError(f"{shown(name)} is a memory: name its base model, {base}.")
    # models that see images too have no class for language alone
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    with torch.device("meta"):
        return find_gates(kind.from_config(config))
