"""Trained prefixes of PEFT: prefix tuning and cartridges fill a cache before the model's call, and hold no text."""

import functools
import sys
from types import FrameType

import torch
from torch import nn
from transformers.cache_utils import Cache

_ATTRIBUTE = "knnmoe_virtual_tokens"
_KINDS = ("PREFIX_TUNING", "CARTRIDGE")


def virtual_tokens(cache: Cache, decoder: nn.Module) -> int:
    """
    Number of slots at the front of a cache that a trained prefix has just filled; 0 if none has, or if more is in it.

    A cache of a prefix made before `mark_trained_prefixes` was called has no mark: then the `PeftModel` is looked for
    among the callers. Its active adapter must be of such a kind, as long as the cache, and belong to this decoder.
    """
    marked = getattr(cache, _ATTRIBUTE, 0)
    if marked:
        return marked if marked == cache.get_seq_length() else 0
    peft = sys.modules.get("peft")
    if peft is None or torch.compiler.is_compiling():
        return 0
    mark_trained_prefixes()
    if not (past := int(cache.get_seq_length())):
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


def mark_trained_prefixes() -> None:
    """
    Makes PEFT mark the caches that it fills with a trained prefix, once in a process and if it is imported.

    Neither a cache nor a call refers to the `PeftModel`, and torch.compile cannot look for it among the callers.
    """
    model = getattr(sys.modules.get("peft"), "PeftModel", None)
    if model is None or getattr(model.get_prompt, "marks_caches", False):
        return
    original = model.get_prompt

    @functools.wraps(original)
    def get_prompt(self, *args, **kwargs):
        prompt = original(self, *args, **kwargs)
        if isinstance(prompt, Cache):
            setattr(prompt, _ATTRIBUTE, prompt.get_seq_length())
        return prompt

    get_prompt.marks_caches = True
    model.get_prompt = get_prompt
