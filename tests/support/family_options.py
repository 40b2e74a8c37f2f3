"""Options of a tiny model of each family, and the prefix of the family's classes in transformers."""

COMMON = dict(
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


def _row(prefix: str, *groups: dict, **own) -> tuple[str, dict]:
    """The prefix of a family's classes in transformers, and its options beyond COMMON."""
    return prefix, {name: value for options in (*groups, own) for name, value in options.items()}


# fmt: off
# one row for each family: with a line for each option they would fill 400 lines
OPTIONS = {
    "olmoe": _row("Olmoe", intermediate_size=16, num_experts=8),
    "qwen3_moe": _row("Qwen3Moe", _SMALL, num_experts=8, head_dim=8, norm_topk_prob=True),
    "gpt_oss": _row("GptOss", intermediate_size=16, num_local_experts=8, head_dim=8, sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "mixtral": _row("Mixtral", intermediate_size=16, num_local_experts=8),
    "qwen2_moe": _row("Qwen2Moe", _SMALL, _THREE, num_experts=8, shared_expert_intermediate_size=16,
        mlp_only_layers=[1]),
    "qwen3_next": _row("Qwen3Next", _SMALL, _THREE, _LINEAR, num_experts=8),
    "qwen3_5_moe": _row("Qwen3_5Moe", _THREE, _LINEAR, num_experts=8, moe_intermediate_size=16),
    "qwen3_vl_moe": _row("Qwen3VLMoe", _SMALL, num_experts=8, head_dim=8),
    "flex_olmo": _row("FlexOlmo", intermediate_size=16, num_experts=8),
    "granitemoe": _row("GraniteMoe", _GRANITE),
    "granitemoeshared": _row("GraniteMoeShared", _GRANITE, shared_intermediate_size=16),
    "granitemoehybrid": _row("GraniteMoeHybrid", _GRANITE, _MAMBA, _THREE, shared_intermediate_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"], position_embedding_type="rope"),
    "granitemoe_swa": _row("GraniteMoeSWA", _GRANITE, sliding_window=8,
        layer_types=["full_attention", "sliding_attention"]),
    # attention with a dense block, then Mamba and attention with experts, ...
    "jamba": _row("Jamba", num_hidden_layers=4, intermediate_size=16, num_experts=8, attn_layer_period=3,
        attn_layer_offset=0, mamba_d_state=8, mamba_dt_rank=4),
    "deepseek_v2": _row("DeepseekV2", _DEEPSEEK_V2, _THREE, first_k_dense_replace=1),
    "deepseek_v2_groups": _row("DeepseekV2", _DEEPSEEK_V2, _THREE, first_k_dense_replace=1,
        topk_method="group_limited_greedy", n_group=2, topk_group=1),
    "deepseek_v3": _row("DeepseekV3", _GROUPED, _LATENT, _THREE, first_k_dense_replace=1),
    "deepseek_v32": _row("DeepseekV32", _GROUPED, _LATENT, _THREE, first_k_dense_replace=1, index_topk=64,
        index_head_dim=16, index_n_heads=4),
    "glm4_moe": _row("Glm4Moe", _GROUPED, _THREE, first_k_dense_replace=1, head_dim=8),
    "glm4_moe_lite": _row("Glm4MoeLite", _GROUPED, _LATENT, _THREE, _DENSE_FIRST),
    "dots1": _row("Dots1", _GROUPED, _THREE, first_k_dense_replace=1, sliding_window=8, max_window_layers=2),
    "minimax_m2": _row("MiniMaxM2", intermediate_size=16, num_local_experts=8, head_dim=8),
    "ernie4_5_moe": _row("Ernie4_5_Moe", _SMALL, _THREE, moe_num_experts=8, moe_num_shared_experts=1, moe_k=2,
        moe_layer_start_index=1),
    "hunyuan_v1_moe": _row("HunYuanMoEV1", intermediate_size=16, num_experts=8, moe_topk=2, head_dim=8),
    "lfm2_moe": _row("Lfm2Moe", _SMALL, _THREE, num_experts=8, num_dense_layers=1, routed_scaling_factor=1.5,
        layer_types=["conv", "full_attention", "conv"]),
    # time_step_min: the scan keeps to this bound, single steps do not
    "nemotron_h": _row("NemotronH", _GROUPED, num_hidden_layers=5,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
        moe_shared_expert_intermediate_size=16, head_dim=8, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16,
        n_groups=1, chunk_size=16, time_step_min=1e-6),
    "kimi_linear": _row("KimiLinear", _SMALL, _LATENT, _GROUPS, _DENSE_FIRST, _THREE, num_local_experts=8,
        q_lora_rank=None, linear_head_dim=8, linear_num_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "mimo_v2_flash": _row("MiMoV2Flash", _GROUPED, _DENSE_FIRST, _THREE, n_shared_experts=None, head_dim=12,
        v_head_dim=8, sliding_window=9, layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    "exaone_moe": _row("ExaoneMoe", _SMALL, _GROUPS, _THREE, num_experts=8, num_shared_experts=1,
        first_k_dense_replace=1, sliding_window=8, sliding_window_pattern=2),
    "solar_open": _row("SolarOpen", _GROUPED, head_dim=8),
    "mellum": _row("Mellum", _SMALL, num_experts=8, head_dim=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"]),
    "minimax": _row("MiniMax", _THREE, intermediate_size=16, num_local_experts=8, head_dim=8, block_size=8),
    "hy_v3": _row("HYV3", _SMALL, _THREE, _DENSE_FIRST, num_experts=8, head_dim=8, num_shared_experts=1,
        router_scaling_factor=1.5),
    "afmoe": _row("Afmoe", _SMALL, _THREE, num_experts=8, num_shared_experts=1, head_dim=8, sliding_window=8,
        global_attn_every_n_layers=2, route_scale=1.5),
    "glm_moe_dsa": _row("GlmMoeDsa", _GROUPED, _LATENT, _THREE, first_k_dense_replace=1, index_topk=64,
        index_head_dim=16, index_n_heads=4),
    "axk1": _row("AXK1", _GROUPED, _LATENT, _THREE, _DENSE_FIRST),
    "mistral4": _row("Mistral4", _GROUPED, _LATENT, _THREE, first_k_dense_replace=1),
    "cohere2_moe": _row("Cohere2Moe", intermediate_size=16, num_experts=8, head_dim=8, num_shared_experts=1,
        sliding_window=8, layer_types=["sliding_attention", "full_attention"], mlp_layer_types=["dense", "sparse"]),
    "aria": _row("AriaText", intermediate_size=16, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1),
    "flint": _row("Flint", _SMALL, mlp_only_layers=[], num_experts=8, head_dim=8, shared_expert_intermediate_size=16,
        sliding_window=8),
    "kolibri1": _row("Kolibri1", moe_intermediate_size=16, num_experts=8, head_dim=8,
        shared_expert_intermediate_size=16, sliding_window=8),
    "laguna": _row("Laguna", _SMALL, _THREE, _DENSE_FIRST, num_experts=8, head_dim=8,
        shared_expert_intermediate_size=16, sliding_window=8, moe_router_logit_softcapping=2.0,
        num_attention_heads_per_layer=[4, 4, 4],
        layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "longcat_flash": _row("LongcatFlash", _LATENT, ffn_hidden_size=32, expert_ffn_hidden_size=16, n_routed_experts=8,
        zero_expert_num=2, moe_topk=2, num_hidden_layers=4, num_layers=2, routed_scaling_factor=1.5, head_dim=8,
        qk_head_dim=16),
    "beam": _row("Beam", _SMALL, _GROUPS, _THREE, _DENSE_FIRST, num_experts=8, head_dim=8, sliding_window=8,
        routed_scaling_factor=1.5),
    "axk2": _row("AXK2", _GROUPED, _LATENT, _THREE, _DENSE_FIRST, _INDEX, head_dim=8, gated_norm_rank=4),
    "hy_v4": _row("HYV4", _GROUPED, _LATENT, _THREE, _DENSE_FIRST, _INDEX, head_dim=16, hc_mult=2),
    "bailing_hybrid": _row("BailingHybrid", _SMALL, _GROUPS, _THREE, _LATENT, num_local_experts=8,
        first_k_dense_replace=1, n_shared_experts=1, routed_scaling_factor=1.5, head_dim=16, layer_group_size=2,
        num_mtp_layers=0),
    "dots3_note": _row("Dots3NoteText", _GROUPED, _LATENT, _THREE, _DENSE_FIRST, _INDEX,
        {"swa_" + name: size for name, size in _LATENT.items()}, head_dim=16, shared_experts_intermediate_size=16,
        swa_num_attention_heads=4, swa_head_dim=16, sliding_window=8),
    "muse_spark": _row("MuseSparkText", _SMALL, _THREE, _DENSE_FIRST, num_local_experts=8, head_dim=8,
        moe_hidden_size=16, sliding_window=8, routed_scaling_factor=1.5),
    "inkling2": _row("Inkling2Text", moe_intermediate_size=16, n_routed_experts=8, head_dim=8,
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4,
        rel_extent=16, unpadded_vocab_size=96),
    "minimax_m3_vl": _row("MiniMaxM3VLText", _THREE, _DENSE_FIRST, intermediate_size=16, dense_intermediate_size=32,
        shared_intermediate_size=16, num_local_experts=8, head_dim=8, rotary_dim=8, index_n_heads=2, index_head_dim=8,
        index_block_size=4, index_topk_blocks=8),
    "step3p7": _row("Step3p7Text", _SMALL, _THREE, _DENSE_FIRST, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        num_local_experts=8, n_routed_experts=8, head_dim=8, share_expert_dim=16, sliding_window=8),
    "glm4v_moe": _row("Glm4vMoeText", _GROUPED, _THREE,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.5}, first_k_dense_replace=1),
    "glm5_next": _row("Glm5NextText", _GROUPED, _LATENT, _THREE, _DENSE_FIRST, _INDEX, qk_rope_head_dim=0,
        qk_nope_head_dim=16, linear_head_dim=8, linear_num_heads=4, hc_mult=2,
        layer_types=["linear_attention", "full_attention", "linear_attention"], index_kpool=4),
    "qwen4_exp": _row("Qwen4ExpText", _THREE, _LINEAR, num_experts=8, moe_intermediate_size=16, hc_count=2,
        hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=32,
        indexer_compress_ratio=4),
    "mistral_large4": _row("MistralLarge4Text", _GROUPED, _LATENT, _THREE, _DENSE_FIRST, _INDEX, head_dim=8),
    "deepseek_ocr2": _row("DeepseekOcr2Text", _SMALL, _THREE, _DENSE_FIRST, n_routed_experts=8, n_shared_experts=1,
        routed_scaling_factor=1.5, head_dim=8),
    "unlimited_ocr": _row("UnlimitedOcrText", _SMALL, _THREE, _DENSE_FIRST, n_routed_experts=8, n_shared_experts=1,
        routed_scaling_factor=1.5, head_dim=8, sliding_window=8),
    "deepseek_v4": _row("DeepseekV4", _THREE, moe_intermediate_size=16, head_dim=16, q_lora_rank=16,
        n_routed_experts=8, n_shared_experts=1, hc_mult=2, o_groups=2, o_lora_rank=8, index_n_heads=4,
        index_head_dim=16, sliding_window=8, num_key_value_heads=1, mlp_layer_types=["hash_moe", "moe", "moe"]),
}
# fmt: on

CONFIG_PREFIXES = {  # the prefix of the configuration, where it is another than the model's
    "qwen3_5_moe": "Qwen3_5MoeText",
    "qwen3_vl_moe": "Qwen3VLMoeText",
}
