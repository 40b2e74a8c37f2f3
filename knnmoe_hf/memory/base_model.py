"""
What a memory asks of its base model: its name and class, its gates, their logits and their fingerprint.

It imports `knnmoe_hf.models`, and with it transformers, only when it is given a model: `knnmoe_hf.memory` itself is
imported without transformers. To open a memory's folder needs transformers nevertheless, for its configuration
(`KNNMoEConfig`) and its tokenizer.
"""

import json
import os
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from knnmoe_hf.lookup.blocks import Derived, Table
from knnmoe_hf.lookup.rules import Router, RoutingRule
from knnmoe_hf.memory.card_data import why_no_repository


class Gate(Protocol):
    """What is read of one MoE layer's router (`knnmoe_hf.models.gates.Gate`)."""

    layer: int
    hidden_size: int
    num_experts: int
    top_k: int
    rule: RoutingRule


class BaseModel:
    """
    A model as a memory sees it.

    Args:
        model: a supported model of transformers, plain or PEFT-wrapped.

    Attributes:
        class_name: of the model inside a PEFT wrapper, such as `"OlmoeForCausalLM"`.
        name_or_path: what it was loaded from, a folder as an absolute path; None if it was made from a configuration.
        gates: `{decoder layer: Gate}`.

    Raises:
        UnsupportedModelError: if a memory cannot be attached to the model.
    """

    def __init__(self, model: nn.Module):
        from knnmoe_hf.models.gates import find_gates

        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        name = getattr(getattr(model, "config", None), "name_or_path", None) or None
        self.class_name = type(inner).__name__
        self.name_or_path = os.path.abspath(name) if name and os.path.isdir(name) else name
        self.gates: dict[int, Gate] = {gate.layer: gate for gate in find_gates(model)}

    def logits(self, layer: int, x: Table) -> Table:
        """The gate's own logits (N, E) float32 for its inputs x (N, d), computed block by block as they are read."""
        from knnmoe_hf.models.gates import gate_logits

        gate = self.gates[layer]
        return Derived(x, gate.num_experts, lambda some: gate_logits(gate, some.detach().to("cpu", torch.float32)))

    def router(self, layer: int) -> Router:
        """How a layer routes by itself, with tensors on the CPU."""
        from knnmoe_hf.models.gates import weights_of

        gate = self.gates[layer]
        with weights_of(gate):
            return Router(gate.current_rule().to("cpu"), gate.top_k)

    def fingerprint(self) -> dict:
        """See `knnmoe_hf.models.fingerprint.fingerprint`."""
        from knnmoe_hf.models.fingerprint import fingerprint

        return fingerprint(list(self.gates.values()))

    def repository_of_folder(self) -> str | None:
        """The repository of the Hub that a local folder names as its own (`_name_or_path` of its `config.json`)."""
        if self.name_or_path is None or not (path := Path(self.name_or_path) / "config.json").is_file():
            return None
        try:
            name = json.loads(path.read_text(encoding="utf-8")).get("_name_or_path")
        except (OSError, ValueError, AttributeError):  # the model was loaded, so its name is all that is missing
            return None
        found = isinstance(name, str) and "/" in name and why_no_repository(name) is None
        return name if found and not Path(name).exists() else None

    def cached_commit(self) -> str | None:
        """
        The commit at which the repository's `main` lies in the local cache; None for a folder or an unknown name.

        A loaded model does not say which commit it came from; one of another revision than `main` needs
        `KNNMoEConfig(base_model_revision=...)`.
        """
        if self.name_or_path is None or Path(self.name_or_path).is_dir():
            return None
        try:
            path = try_to_load_from_cache(self.name_or_path, "config.json")
        except HFValidationError:
            return None
        return Path(path).parent.name if isinstance(path, str) else None
