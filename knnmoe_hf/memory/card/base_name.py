"""What the base model of a memory is called where others read it: its repository on the Hub, and never a path."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from knnmoe_hf.memory.card_data import why_no_repository
from knnmoe_hf.memory.data import Memory, MemoryData


def repository_of(memory: MemoryData) -> str | None:
    """The repository of the base model on the Hub; None if it was built from a folder that names none."""
    name = memory.config.base_model_name_or_path
    if name is not None and why_no_repository(name) is None and not Path(name).exists():
        return name
    return memory.card_data.finetuned_from


def published(memory: Memory) -> Memory:
    """
    The memory as it is uploaded: its configuration names the base model's repository, or nothing, but no folder.

    Without a name it is loaded with `KNNMoEForCausalLM.from_pretrained(base_model, memory=...)`.
    """
    name = repository_of(memory)
    if name == memory.config.base_model_name_or_path:
        return memory
    config = copy.deepcopy(memory.config)
    config.base_model_name_or_path = name
    return replace(memory, config=config)


def stated(memory: Memory, model_card_kwargs: Mapping[str, Any] | None) -> Memory:
    """The memory with these statements for its card (see `CardData.stated`); as it is if None."""
    if not model_card_kwargs:
        return memory
    return replace(memory, card_data=memory.card_data.stated(**model_card_kwargs))
