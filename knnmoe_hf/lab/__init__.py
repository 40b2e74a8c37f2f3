"""Small MoE models trained on the standard library's text, one for each routing rule.

The installed package has OLMoE's; the others are in the repository.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_REPOSITORY = _PACKAGE.parent.parent

LAB_MODELS: dict[str, Path] = {
    "olmoe": _PACKAGE / "olmoe",
    "qwen3_moe": _REPOSITORY / "model_cards" / "lab-qwen3-moe",
    "gpt_oss": _REPOSITORY / "model_cards" / "lab-gpt-oss",
}
"""The folder of each lab model: weights in bfloat16, tokenizer and `held_out.json`."""
