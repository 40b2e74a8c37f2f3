"""Tiny real models of every family of Mixture-of-Experts models that a memory can be attached to."""

import torch
import transformers

from tests.support.family_options import COMMON, CONFIG_PREFIXES, OPTIONS
from tests.support.family_vision import TOWERS, with_tower

FAMILIES = tuple(OPTIONS)
"""Every family's name; `deepseek_v2_groups` is DeepSeek-V2 with experts chosen from the best groups."""

HYBRID = (
    *("qwen3_next", "qwen3_5_moe", "granitemoehybrid", "jamba", "lfm2_moe", "nemotron_h", "kimi_linear", "minimax"),
    *("bailing_hybrid", "glm5_next", "qwen4_exp", "inkling2"),
)
"""Those whose layers are not all attention: linear attention, state spaces or convolutions keep part of the past."""


def family_config(name: str, **options):
    """The configuration of a tiny model: 2 to 5 layers, width 32, 8 experts, top-2, a vocabulary of 96."""
    prefix, more = OPTIONS[name]
    return getattr(transformers, CONFIG_PREFIXES.get(name, prefix) + "Config")(**(COMMON | more | options))


def family_model(name: str, seed: int = 0, **options):
    """
    A randomly initialised model of a family, in float32 and eval mode; `options` go to its configuration.

    Weights are large enough for routing to matter, and correction biases large enough to change the choice of experts.
    """
    torch.manual_seed(seed)
    config = family_config(name, **options)
    prefix = "AriaText" if name == "aria" else OPTIONS[name][0].removesuffix("Text")
    if name in TOWERS:
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(with_tower(prefix, config, TOWERS[name]))
    else:
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if path.endswith(("e_score_correction_bias", "expert_bias")):
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()
