"""
Keeps what is in force fixed for the length of a generation.

`generate` of transformers runs many forwards, and continuous batching runs them in a thread of its own. Their methods
are wrapped once, in transformers' own classes: what is in force for the caller when a generation begins stays in force
for it until it ends. Models without a memory generate as before.
"""

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager

from knnmoe_hf.errors import shown
from knnmoe_hf.models import in_force
from knnmoe_hf.models.hooks import RoutingHooks, fixed

_CONTEXT = "_knnmoe_context"  # of a manager: the context variables of the thread that started it


def fix_generations() -> None:
    """Wraps the methods by which a generation begins."""
    _wrap(GenerationMixin, "generate", _generate)
    _wrap(ContinuousBatchingManager, "start", _start)
    _wrap(ContinuousBatchingManager, "warmup", _warm_up)
    _wrap(ContinuousBatchingManager, "add_request", _add_request)
    _wrap(ContinuousBatchingManager, "_run_generation_loop", _run_generation_loop)
