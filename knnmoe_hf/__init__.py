"""Routing memories for frozen Mixture-of-Experts language models.

Public names are imported when they are first used, so that importing this package is quick and needs no transformers.
"""

import importlib

from knnmoe_hf.registration import register_all
from knnmoe_hf.version import __version__

_MODULES = {
    "KNNMoEConfig": "config",
    "KNNMoEForCausalLM": "models.auto",
    "KNNMoETrainer": "training.trainer",
    "KNNMoETrainingArguments": "training.arguments",
    "RoutingMemory": "memory",
    "active_memory": "models.attach",
    "attach_memory": "models.attach",
    "attach_override": "models.attach",
    "calibrate": "calibration.calibrate",
    "detach_memory": "models.attach",
    "disable_memory": "models.attach",
    "get_memory": "models.attach",
    "set_memory": "models.attach",
    "trace_routing": "explain.trace",
    "use_memory": "models.attach",
    "watch_lookups": "models.attach",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_all()
