"""Tiny real models of every family of Mixture-of-Experts models that a memory can be attached to."""

import torch
import transformers

_COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
_THREE = dict(num_hidden_layers=3)
_SMALL = dict(intermediate_size=32, moe_intermediate_size=16)
_GROUPS = dict(n_group=4, topk_group=2)
_GROUPED = _SMALL | _GROUPS | dict(n_routed_experts=8, n_shared_experts=1, routed_scaling_factor=1.5)
_LATENT = dict(  # attention with keys and values of low rank
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4
)
_DEEPSEEK_V2 = _SMALL | _LATENT | dict(n_routed_experts=8, n_shared_experts=1, routed_scaling_factor=1.5)
_LINEAR = dict(  # linear attention of Qwen3-Next
    head_dim=8,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    shared_expert_intermediate_size=16,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
_GRANITE = dict(intermediate_size=16, num_local_experts=8, attention_multiplier=0.35)
_MAMBA = dict(mamba_n_heads=4, mamba_n_groups=1, mamba_d_state=8, mamba_d_head=16, mamba_chunk_size=16)
_INDEX = dict(index_topk=64, index_head_dim=16, index_n_heads=4)
_DENSE_FIRST = dict(mlp_layer_types=["dense", "sparse", "sparse"])

_ROWS = {  # the prefix of the family's classes in transformers, options beyond _COMMON
    "olmoe": ("Olmoe", dict(intermediate_size=16, num_experts=8)),
    "qwen3_moe": ("Qwen3Moe", _SMALL | dict(num_experts=8, head_dim=8, norm_topk_prob=True)),
    "gpt_oss": (
        "GptOss",
        dict(
            intermediate_size=16,
            num_local_experts=8,
            head_dim=8,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "mixtral": ("Mixtral", dict(intermediate_size=16, num_local_experts=8)),
    "qwen2_moe": (
        "Qwen2Moe",
        _SMALL | _THREE | dict(num_experts=8, shared_expert_intermediate_size=16, mlp_only_layers=[1]),
    ),
    "qwen3_next": ("Qwen3Next", _SMALL | _THREE | _LINEAR | dict(num_experts=8)),
    "qwen3_5_moe": ("Qwen3_5Moe", _THREE | _LINEAR | dict(num_experts=8, moe_intermediate_size=16)),
    "qwen3_vl_moe": ("Qwen3VLMoe", _SMALL | dict(num_experts=8, head_dim=8)),
    "flex_olmo": ("FlexOlmo", dict(intermediate_size=16, num_experts=8)),
    "granitemoe": ("GraniteMoe", _GRANITE),
    "granitemoeshared": ("GraniteMoeShared", _GRANITE | dict(shared_intermediate_size=16)),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        _GRANITE
        | _MAMBA
        | _THREE
        | dict(
            shared_intermediate_size=16,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            position_embedding_type="rope",
        ),
    ),
    "granitemoe_swa": (
        "GraniteMoeSWA",
        _GRANITE | dict(sliding_window=8, layer_types=["full_attention", "sliding_attention"]),
    ),
    "jamba": (  # attention with a dense block, then Mamba and attention with experts, ...
        "Jamba",
        dict(
            num_hidden_layers=4,
            intermediate_size=16,
            num_experts=8,
            attn_layer_period=3,
            attn_layer_offset=0,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
    ),
    "deepseek_v2": ("DeepseekV2", _DEEPSEEK_V2 | _THREE | dict(first_k_dense_replace=1)),
    "deepseek_v2_groups": (
        "DeepseekV2",
        _DEEPSEEK_V2
        | _THREE
        | dict(first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=2, topk_group=1),
    ),
    "deepseek_v3": ("DeepseekV3", _GROUPED | _LATENT | _THREE | dict(first_k_dense_replace=1)),
    "deepseek_v32": (
        "DeepseekV32",
        _GROUPED | _LATENT | _THREE | dict(first_k_dense_replace=1, index_topk=64, index_head_dim=16, index_n_heads=4),
    ),
    "glm4_moe": ("Glm4Moe", _GROUPED | _THREE | dict(first_k_dense_replace=1, head_dim=8)),
    "glm4_moe_lite": ("Glm4MoeLite", _GROUPED | _LATENT | _THREE | _DENSE_FIRST),
    "dots1": ("Dots1", _GROUPED | _THREE | dict(first_k_dense_replace=1, sliding_window=8, max_window_layers=2)),
    "minimax_m2": ("MiniMaxM2", dict(intermediate_size=16, num_local_experts=8, head_dim=8)),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        _SMALL | _THREE | dict(moe_num_experts=8, moe_num_shared_experts=1, moe_k=2, moe_layer_start_index=1),
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", dict(intermediate_size=16, num_experts=8, moe_topk=2, head_dim=8)),
    "lfm2_moe": (
        "Lfm2Moe",
        _SMALL
        | _THREE
        | dict(
            num_experts=8,
            num_dense_layers=1,
            routed_scaling_factor=1.5,
            layer_types=["conv", "full_attention", "conv"],
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        _GROUPED
        | dict(
            num_hidden_layers=5,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
            moe_shared_expert_intermediate_size=16,
            head_dim=8,
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=1,
            chunk_size=16,
            time_step_min=1e-6,  # the scan keeps to this bound, single steps do not
        ),
    ),
    "kimi_linear": (
        "KimiLinear",
        _SMALL
        | _LATENT
        | _GROUPS
        | _DENSE_FIRST
        | _THREE
        | dict(
            num_local_experts=8,
            q_lora_rank=None,
            linear_head_dim=8,
            linear_num_heads=4,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    "mimo_v2_flash": (
        "MiMoV2Flash",
        _GROUPED
        | _DENSE_FIRST
        | _THREE
        | dict(
            n_shared_experts=None,
            head_dim=12,
            v_head_dim=8,
            sliding_window=9,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ),
    "exaone_moe": (
        "ExaoneMoe",
        _SMALL
        | _GROUPS
        | _THREE
        | dict(
            num_experts=8, num_shared_experts=1, first_k_dense_replace=1, sliding_window=8, sliding_window_pattern=2
        ),
    ),
    "solar_open": ("SolarOpen", _GROUPED | dict(head_dim=8)),
    "mellum": (
        "Mellum",
        _SMALL
        | dict(num_experts=8, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    "minimax": ("MiniMax", _THREE | dict(intermediate_size=16, num_local_experts=8, head_dim=8, block_size=8)),
    "hy_v3": (
        "HYV3",
        _SMALL
        | _THREE
        | _DENSE_FIRST
        | dict(num_experts=8, head_dim=8, num_shared_experts=1, router_scaling_factor=1.5),
    ),
    "afmoe": (
        "Afmoe",
        _SMALL
        | _THREE
        | dict(
            num_experts=8,
            num_shared_experts=1,
            head_dim=8,
            sliding_window=8,
            global_attn_every_n_layers=2,
            route_scale=1.5,
        ),
    ),
    "glm_moe_dsa": (
        "GlmMoeDsa",
        _GROUPED | _LATENT | _THREE | dict(first_k_dense_replace=1, index_topk=64, index_head_dim=16, index_n_heads=4),
    ),
    "axk1": ("AXK1", _GROUPED | _LATENT | _THREE | _DENSE_FIRST),
    "mistral4": ("Mistral4", _GROUPED | _LATENT | _THREE | dict(first_k_dense_replace=1)),
    "cohere2_moe": (
        "Cohere2Moe",
        dict(
            intermediate_size=16,
            num_experts=8,
            head_dim=8,
            num_shared_experts=1,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            mlp_layer_types=["dense", "sparse"],
        ),
    ),
    "aria": ("AriaText", dict(intermediate_size=16, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1)),
    "flint": (
        "Flint",
        _SMALL
        | dict(mlp_only_layers=[], num_experts=8, head_dim=8, shared_expert_intermediate_size=16, sliding_window=8),
    ),
    "kolibri1": (
        "Kolibri1",
        dict(
            moe_intermediate_size=16, num_experts=8, head_dim=8, shared_expert_intermediate_size=16, sliding_window=8
        ),
    ),
    "laguna": (
        "Laguna",
        _SMALL
        | _THREE
        | _DENSE_FIRST
        | dict(
            num_experts=8,
            head_dim=8,
            shared_expert_intermediate_size=16,
            sliding_window=8,
            moe_router_logit_softcapping=2.0,
            num_attention_heads_per_layer=[4, 4, 4],
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
    ),
    "longcat_flash": (
        "LongcatFlash",
        _LATENT
        | dict(
            ffn_hidden_size=32,
            expert_ffn_hidden_size=16,
            n_routed_experts=8,
            zero_expert_num=2,
            moe_topk=2,
            num_hidden_layers=4,
            num_layers=2,
            routed_scaling_factor=1.5,
            head_dim=8,
            qk_head_dim=16,
        ),
    ),
    "beam": (
        "Beam",
        _SMALL
        | _GROUPS
        | _THREE
        | _DENSE_FIRST
        | dict(num_experts=8, head_dim=8, sliding_window=8, routed_scaling_factor=1.5),
    ),
    "axk2": ("AXK2", _GROUPED | _LATENT | _THREE | _DENSE_FIRST | _INDEX | dict(head_dim=8, gated_norm_rank=4)),
    "hy_v4": ("HYV4", _GROUPED | _LATENT | _THREE | _DENSE_FIRST | _INDEX | dict(head_dim=16, hc_mult=2)),
    "bailing_hybrid": (
        "BailingHybrid",
        _SMALL
        | _GROUPS
        | _THREE
        | _LATENT
        | dict(
            num_local_experts=8,
            first_k_dense_replace=1,
            n_shared_experts=1,
            routed_scaling_factor=1.5,
            head_dim=16,
            layer_group_size=2,
            num_mtp_layers=0,
        ),
    ),
    "dots3_note": (
        "Dots3NoteText",
        _GROUPED
        | _LATENT
        | _THREE
        | _DENSE_FIRST
        | _INDEX
        | {"swa_" + name: size for name, size in _LATENT.items()}
        | dict(
            head_dim=16,
            shared_experts_intermediate_size=16,
            swa_num_attention_heads=4,
            swa_head_dim=16,
            sliding_window=8,
        ),
    ),
    "muse_spark": (
        "MuseSparkText",
        _SMALL
        | _THREE
        | _DENSE_FIRST
        | dict(num_local_experts=8, head_dim=8, moe_hidden_size=16, sliding_window=8, routed_scaling_factor=1.5),
    ),
    "inkling2": (
        "Inkling2Text",
        dict(
            moe_intermediate_size=16,
            n_routed_experts=8,
            head_dim=8,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=8,
            sliding_window_size=8,
            d_rel=4,
            rel_extent=16,
            unpadded_vocab_size=96,
        ),
    ),
    "minimax_m3_vl": (
        "MiniMaxM3VLText",
        _THREE
        | _DENSE_FIRST
        | dict(
            intermediate_size=16,
            dense_intermediate_size=32,
            shared_intermediate_size=16,
            num_local_experts=8,
            head_dim=8,
            rotary_dim=8,
            index_n_heads=2,
            index_head_dim=8,
            index_block_size=4,
            index_topk_blocks=8,
        ),
    ),
    "step3p7": (
        "Step3p7Text",
        _SMALL
        | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        | _THREE
        | _DENSE_FIRST
        | dict(num_local_experts=8, n_routed_experts=8, head_dim=8, share_expert_dim=16, sliding_window=8),
    ),
    "glm4v_moe": (
        "Glm4vMoeText",
        _GROUPED
        | _THREE
        | dict(
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.5,
            },
            first_k_dense_replace=1,
        ),
    ),
    "glm5_next": (
        "Glm5NextText",
        _GROUPED
        | _LATENT
        | _THREE
        | _DENSE_FIRST
        | _INDEX
        | dict(
            qk_rope_head_dim=0,
            qk_nope_head_dim=16,
            linear_head_dim=8,
            linear_num_heads=4,
            hc_mult=2,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            index_kpool=4,
        ),
    ),
    "qwen4_exp": (
        "Qwen4ExpText",
        _THREE
        | _LINEAR
        | dict(
            num_experts=8,
            moe_intermediate_size=16,
            hc_count=2,
            hc_lowrank=8,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=32,
            indexer_compress_ratio=4,
        ),
    ),
    "mistral_large4": ("MistralLarge4Text", _GROUPED | _LATENT | _THREE | _DENSE_FIRST | _INDEX | dict(head_dim=8)),
    "deepseek_ocr2": (
        "DeepseekOcr2Text",
        _SMALL
        | _THREE
        | _DENSE_FIRST
        | dict(n_routed_experts=8, n_shared_experts=1, routed_scaling_factor=1.5, head_dim=8),
    ),
    "unlimited_ocr": (
        "UnlimitedOcrText",
        _SMALL
        | _THREE
        | _DENSE_FIRST
        | dict(n_routed_experts=8, n_shared_experts=1, routed_scaling_factor=1.5, head_dim=8, sliding_window=8),
    ),
    "deepseek_v4": (
        "DeepseekV4",
        _THREE
        | dict(
            moe_intermediate_size=16,
            head_dim=16,
            q_lora_rank=16,
            n_routed_experts=8,
            n_shared_experts=1,
            hc_mult=2,
            o_groups=2,
            o_lora_rank=8,
            index_n_heads=4,
            index_head_dim=16,
            sliding_window=8,
            num_key_value_heads=1,
            mlp_layer_types=["hash_moe", "moe", "moe"],
        ),
    ),
}
FAMILIES = tuple(_ROWS)
"""Every family's name; `deepseek_v2_groups` is DeepSeek-V2 with experts chosen from the best groups."""

HYBRID = (
    *("qwen3_next", "qwen3_5_moe", "granitemoehybrid", "jamba", "lfm2_moe", "nemotron_h", "kimi_linear", "minimax"),
    *("bailing_hybrid", "glm5_next", "qwen4_exp", "inkling2"),
)
"""Those whose layers are not all attention: linear attention, state spaces or convolutions keep part of the past."""


_OF_TEXT = {  # the prefix of the configuration, where it is another than the model's
    "qwen3_5_moe": "Qwen3_5MoeText",
    "qwen3_vl_moe": "Qwen3VLMoeText",
}


def family_config(name: str, **options):
    """The configuration of a tiny model: 2 to 5 layers, width 32, 8 experts, top-2, a vocabulary of 96."""
    prefix, more = _ROWS[name]
    return getattr(transformers, _OF_TEXT.get(name, prefix) + "Config")(**(_COMMON | more | options))


def family_model(name: str, seed: int = 0, **options):
    """
    A randomly initialised model of a family, in float32 and eval mode; `options` go to its configuration.

    Weights are large enough for routing to matter, and correction biases large enough to change the choice of experts.
    """
    torch.manual_seed(seed)
    config = family_config(name, **options)
    prefix = "AriaText" if name == "aria" else _ROWS[name][0].removesuffix("Text")
    if name in _VISION:
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(_with_vision(prefix, config, _VISION[name]))
    else:
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if path.endswith(("e_score_correction_bias", "expert_bias")):
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()


_TOWER = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4)
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
_VISION = {  # vision towers of one layer, of families without a class of their language model alone that generates
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


def _with_vision(prefix: str, text, vision: dict):
    """The configuration of a model that also sees images."""
    kind = getattr(transformers, f"{prefix}Config")
    options = {name: 90 + place for place, name in enumerate(_PLACEHOLDERS) if name in kind.__annotations__}
    if prefix == "MuseSpark":
        options |= dict(out_hidden_size=16, projector_hidden_size=16, audio_config=dict(_EARS))
    return kind(text_config=text.to_dict(), vision_config=vision, **options)


_EARS = dict(patch_sizes=(4,), hidden_sizes=(16,), depths=(1,), num_hidden_layers=1, out_hidden_size=32)
