"""What was done to a memory since it was built, in lines for its card."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from knnmoe_hf.memory.verdict import MEASURED_WITH

if TYPE_CHECKING:  # both import this module; the configuration is a class of transformers
    from knnmoe_hf.config import KNNMoEConfig
    from knnmoe_hf.memory.data import Memory

OPTIONS_CHANGED = "options were changed: "
"""How the line of a changed configuration begins."""


def noted(memory: "Memory", line: str) -> "Memory":
    """The same memory, with one more line of history."""
    return replace(memory, card_data=memory.card_data.noted(line))


def changes(before: "KNNMoEConfig", after: "KNNMoEConfig") -> list[str]:
    """The options that two configurations do not share, `"gamma 0.3 -> 0.5"` each; what only serves speed is not."""
    return differences({name: getattr(before, name) for name in MEASURED_WITH}, after)


def differences(before: Mapping[str, Any], after: "KNNMoEConfig") -> list[str]:
    """As `changes`, for some options by name."""
    pairs = {name: (_ordered(value), _ordered(getattr(after, name))) for name, value in before.items()}
    return [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
