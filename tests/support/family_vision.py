"""Vision towers of one layer, of families without a class of their language model alone that generates."""

import transformers

_TOWER = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4)
_EARS = dict(patch_sizes=(4,), hidden_sizes=(16,), depths=(1,), num_hidden_layers=1, out_hidden_size=32)
_LAYERS = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4)
_SAM = dict(
    hidden_size=16,
    output_channels=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=64,
    global_attn_indexes=(0,),
    downsample_channels=[8, 16],
)
TOWERS = {  # vision towers of one layer, of families without a class of their language model alone that generates
    "qwen3_vl_moe": _TOWER | dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
    "glm4v_moe": _TOWER | dict(image_size=16),
    "glm5_next": _TOWER | dict(image_size=16, projection_intermediate_size=16),
    "muse_spark": _LAYERS | dict(pos_emb_height=4, pos_emb_width=4, max_position_embeddings=16),
    "mistral_large4": _LAYERS | dict(model_type="pixtral", image_size=16),
    "step3p7": _LAYERS | dict(image_size=16, max_position_embeddings=16),
    "deepseek_ocr2": dict(
        sam_config=_SAM,
        encoder_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=8,
        ),
    ),
    "unlimited_ocr": dict(
        sam_config=_SAM | dict(mlp_dim=16, downsample_channels=(8, 16)), encoder_config=_LAYERS | dict(image_size=16)
    ),
}
_PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "image_start_token_id",
)


def with_tower(prefix: str, text, vision: dict):
    """The configuration of a model that also sees images."""
    kind = getattr(transformers, f"{prefix}Config")
    options = {name: 90 + place for place, name in enumerate(_PLACEHOLDERS) if name in kind.__annotations__}
    if prefix == "MuseSpark":
        options |= dict(out_hidden_size=16, projector_hidden_size=16, audio_config=dict(_EARS))
    return kind(text_config=text.to_dict(), vision_config=vision, **options)
