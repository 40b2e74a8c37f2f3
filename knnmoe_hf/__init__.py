"""Routing memories for frozen Mixture-of-Experts language models."""

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import (
    active_memory,
    attach_memory,
    detach_memory,
    disable_memory,
    get_memory,
    set_memory,
    watch_lookups,
)
from knnmoe_hf.models.auto import KNNMoEForCausalLM, register
from knnmoe_hf.training import KNNMoETrainer, KNNMoETrainingArguments
from knnmoe_hf.version import __version__

# isort: split
from knnmoe_hf.calibration.calibrate import calibrate

__all__ = [
    "__version__",
    "KNNMoEConfig",
    "KNNMoEForCausalLM",
    "KNNMoETrainer",
    "KNNMoETrainingArguments",
    "RoutingMemory",
    "active_memory",
    "attach_memory",
    "calibrate",
    "detach_memory",
    "disable_memory",
    "get_memory",
    "set_memory",
    "watch_lookups",
]

register()
