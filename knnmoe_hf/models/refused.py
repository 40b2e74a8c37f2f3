"""Routers of transformers that a memory cannot be attached to, each with the reason."""

_OTHER = "use a model of another family"
_NO_CHOICE = "it returns no expert ids that could be replaced"

REFUSED = {
    "Llama4Router": (f"Llama 4's experts all run and {_NO_CHOICE}", _OTHER),
    "Gemma4TextRouter": ("Gemma 4's router returns probabilities where logits are needed, scaled by expert", _OTHER),
    "DiffusionGemmaTextRouter": (
        "DiffusionGemma's router returns probabilities where logits are needed, scaled by expert",
        _OTHER,
    ),
    "PhimoeTopKRouter": (
        "PhiMoE's sparse mixer is defined for its own two experts only, one masked by the other",
        _OTHER,
    ),
    "DbrxRouter": ("DBRX chooses experts in the block after its router, where no hook can replace them", _OTHER),
    "DogeCDMoE": ("Doge looks its experts up by products of keys, without a gate", _OTHER),
    "Ernie4_5_VLMoeMoeBlock": (
        "ERNIE-4.5-VL routes text and images by different gates inside one block",
        "use the text model, ERNIE-4.5-MoE",
    ),
    "JetMoeAttention": ("JetMoE routes attention too, by lists that are sorted by expert", _OTHER),
    "JetMoeTopKGating": ("JetMoE's gate returns lists that are sorted by expert", _OTHER),
    "SwitchTransformersTop1Router": (
        f"Switch Transformers drop tokens by the experts' capacity and {_NO_CHOICE}",
        _OTHER,
    ),
    "NllbMoeTop2Router": (f"NLLB-MoE drops tokens by the experts' capacity and {_NO_CHOICE}", _OTHER),
    "InklingTopkRouter": ("Inkling's router weighs shared experts against the chosen ones in one softmax", _OTHER),
    "ZayaRouter": ("Zaya's routers hand a state on from layer to layer, and leave out experts", _OTHER),
    "OpenAIPrivacyFilterTopKRouter": (
        "OpenAI's privacy filter labels tokens, it does not predict the next one",
        _OTHER,
    ),
    "Qwen3OmniMoeThinkerTextTopKRouter": (
        "Qwen3-Omni's thinker ignores logits_to_keep and keeps the positions of its last call for the next",
        "use Qwen3-MoE or Qwen3-VL-MoE",
    ),
    "Qwen3OmniMoeTalkerTextTopKRouter": (
        "Qwen3-Omni's talker predicts speech codes, not text",
        "use Qwen3-MoE or Qwen3-VL-MoE",
    ),
    "Qwen3OmniMoeTextTopKRouter": ("no model of transformers 5.23 contains it", _OTHER),
}
"""By router class: why it is refused, and the way out."""
