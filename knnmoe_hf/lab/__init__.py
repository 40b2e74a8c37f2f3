"""Small MoE models trained offline from the standard library's text, one for each routing rule.

Only OLMoE's is part of the installed package; its siblings live in the repository.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_REPOSITORY = _PACKAGE.parent.parent

LAB_MODELS: dict[str, Path] = {
    "olmoe": _PACKAGE / "olmoe",
    "qwen3_moe": _REPOSITORY / "model_cards" / "lab-qwen3-moe",
    "gpt_oss": _REPOSITORY / "model_cards" / "lab-gpt-oss",
}
"""Folder of each lab model: weights in bf16, tokenizer, `held_out.json`."""
