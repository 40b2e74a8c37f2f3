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
    "deepseek_v2": _REPOSITORY / "model_cards" / "lab-deepseek-v2",
    "deepseek_v3": _REPOSITORY / "model_cards" / "lab-deepseek-v3",
    "minimax_m2": _REPOSITORY / "model_cards" / "lab-minimax-m2",
    "ernie4_5_moe": _REPOSITORY / "model_cards" / "lab-ernie4-5-moe",
}
"""The folder of each lab model, by model type: weights in bfloat16, tokenizer and `held_out.json`."""
