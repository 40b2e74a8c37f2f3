"""Trained prefixes of PEFT: prefix tuning and cartridges fill a cache before the model's call, and hold no text."""

import sys
from types import FrameType

import torch
from torch import nn
from transformers.cache_utils import Cache

_KINDS = ("PREFIX_TUNING", "CARTRIDGE")


def virtual_tokens(cache: Cache, decoder: nn.Module) -> int:
    """
    Number of slots of a cache that a trained prefix has just filled; 0 if none has.

    PEFT marks neither the cache nor the call, so the `PeftModel` is looked for among the callers: its active adapter
    must be of such a kind, as long as the cache, and belong to this decoder.
    """
    peft = sys.modules.get("peft")
    if peft is None or torch.compiler.is_compiling() or not (past := int(cache.get_seq_length())):
        return 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(caller, peft.PeftModel) and _prefix_of(caller) == past:
            if any(module is decoder for module in caller.modules()):
                return past
        frame = frame.f_back
    return 0


def _prefix_of(model: nn.Module) -> int | None:
    config = model.active_peft_config
    kind = getattr(config.peft_type, "value", config.peft_type)
    return config.num_virtual_tokens if kind in _KINDS else None
