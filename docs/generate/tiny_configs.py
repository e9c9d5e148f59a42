"""Tiny configs for all language models of transformers: sets sizes by the names that configs use for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from ulysses_infer.model.injection.architectures import DECODERS, ENCODERS

VOCABULARY = 101
LAYERS = 2
HEADS = 8

# Sizes under every name that configs use. Only names that a config has are set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "dim",
            "embedding_size",
            "input_embedding_size",
            "hidden_size_per_layer_input",
            "shared_embedding_size",
            "embed_dim",
            "word_embed_proj_dim",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "d_ff",
            "dff",
            "dim_ff",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "d_inner",
            "block_ff_dim",
        ),
        96,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), LAYERS
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "encoder_attention_heads"),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "dim_head",
            "d_kv",
            "kv_channels",
            "rotary_dim",
            "swa_head_dim",
            "swa_v_head_dim",
            "global_head_dim",
        ),
        16,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "ffn_intermediate_size",
            "prefix_dense_intermediate_size",
            "dense_intermediate_size",
            "expert_intermediate_size",
        ),
        32,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_num_primary_experts"), 4
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_topk",
            "moe_k",
            "moe_top_k",
            "top_k_experts",
            "num_selected_experts",
        ),
        2,
    ),
    **dict.fromkeys(("n_group", "topk_group", "zero_expert_num"), 1),
    **dict.fromkeys(
        (
            "first_k_dense_replace",
            "num_dense_layers",
            "moe_layer_start_index",
            "decoder_sparse_step",
            "moe_layer_freq",
            "num_shared_experts",
            "n_shared_experts",
        ),
        1,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 24),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    "v_head_dim": 12,
    "qk_head_dim": 16,
    **dict.fromkeys(
        ("sliding_window", "attention_chunk_size", "window_size", "sliding_window_size", "local_window_size"), 6
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "n_positions"), 128),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_head_dim"), 8),
    "linear_num_key_heads": 2,  # fewer than ranks
    "linear_value_head_dim": 12,
    **dict.fromkeys(("index_topk", "index_head_dim"), 8),
    "index_n_heads": 16,  # with few heads, many keys have no score but 0, of which transformers selects any
    "query_pre_attn_scalar": 16,
    "layer_group_size": 2,
}
# Options that add weights: enabled wherever a config has them, because a model that works with them works without.
OPTIONS = dict.fromkeys(("attention_bias", "mlp_bias", "use_qk_norm", "qk_layernorm", "use_bias", "lm_head_bias"), True)
WIDTHS = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "out_hidden_size", "projector_input_dim")
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "num_blocks")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "num_key_value_groups", "swa_num_key_value_heads")
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2, "decoder_start_token_id": 1}

SCAN = {"chunk_size": 8}  # shorter than prompts
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}

# Of models whose layers differ.
LOCAL_AND_GLOBAL = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED_LAYERS = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY}
WIDE_GLOBALS = {"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 2, "attention_k_eq_v": True}

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}

# Values that some model types need besides.
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True, "pad_token_id": 1} for name in ENCODERS},
    **{
        name: {
            "is_decoder": True,
            "is_encoder_decoder": False,
            "scale_embedding": True,
            "forced_eos_token_id": None,
        }
        for name in DECODERS
    },
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "gptj": {"rotary_dim": 8, "n_inner": None},
    "codegen": {"rotary_dim": 8, "n_inner": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 96},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4, "alibi": False},
    "diffllama": {"num_key_value_heads": 8},  # as many pairs as ranks
    "phi3": {"original_max_position_embeddings": 128},
    "stablelm": {"qk_layernorm": False},  # refused if true: one norm module per head
    "nanochat": {"head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": [2, 2]},
    "ministral": {"head_dim": 16},
    "longcat_flash": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "bailing_hybrid": {"num_expert_group": 2},
    "mamba2": {**SCAN, "n_groups": 2, "state_size": 8, "use_bias": True},
    "mamba": {"state_size": 8, "use_bias": True},
    "falcon_mamba": {"state_size": 8, "use_bias": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_proj_bias": True},
    "bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_proj_bias": True},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": {
        **MAMBA,
        "mamba_d_ssm": 128,
        "mamba_rms_norm": True,
        "ssm_in_multiplier": 1.2,
        "ssm_multipliers": [0.9, 1.1, 1.2, 0.8, 1.3],
    },
    "nemotron_h": {**SCAN, "mamba_num_heads": 8, "mamba_head_dim": 12, "ssm_state_size": 8, "n_groups": 2},
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 6},
    "zamba": {
        "layer_types": ["linear_attention", "hybrid", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "attention_head_dim": 16,
        "num_key_value_heads": 8,
    },
    "zamba2": {
        **SCAN,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "adapter_rank": 4,
        "num_key_value_heads": 8,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
    },
    **{name: {"indexer_types": ["full", "shared"]} for name in ("glm_moe_dsa", "hy_v4")},
    "mistral_large4_text": {
        "layer_types": ["indexed_attention"] * 4,
        "indexer_types": ["full", "shared", "full", "shared"],
        "no_rope_layers": [1, 0, 1, 0],
        "kv_source_layers": [0, 1, 0, 1],
    },
    "dots3_note_text": {
        "shared_experts_intermediate_size": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"], "per_layer_config": {}, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_out_dim": 64},
    "flint": {"mlp_only_layers": [0], "num_experts": 4},
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 2},
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "o_groups": 4,
        "hc_sinkhorn_iters": 3,
        "swiglu_limit": 1.0,
    },
    "nemotron": {"head_dim": 8},
    "bitnet": {"num_key_value_heads": 4},
    "glm5_next_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "indexer_types": ["full", "full"],
        "index_kpool": 2,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "qk_rope_head_dim": 0,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 24,
        "indexer_budget": 6,
        "indexer_compress_ratio": 3,
        "hc_count": 2,
        "hc_lowrank": 12,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "heads_per_ngram": 4,
        "ngram_vocab_size_base": 40,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 4,
        "eos_token_id": 50,
    },
    "inkling_text": {
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "rel_extent": 10,
        "log_scaling_n_floor": 12,
        "mlp_layer_types": ["dense", "sparse"],
        "n_shared_experts": 2,
    },
    "inkling2_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid", "hybrid_sliding"],
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "rel_extent": 10,
        "log_scaling_n_floor": 12,
        "n_layers_per_attn_res_block": 2,
        "unpadded_vocab_size": VOCABULARY,
    },
    "llama4_text": {"interleave_moe_layer_step": 1, "no_rope_layers": [1, 0]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "hunyuan_vl_text": {"head_dim": 16},
    "gemma3n_text": {
        **LOCAL_AND_GLOBAL,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.0],
        **SHARED_LAYERS,
    },
    "gemma4_text": {
        **LOCAL_AND_GLOBAL,
        **SHARED_LAYERS,
        **WIDE_GLOBALS,
        "use_double_wide_mlp": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_unified_text": {**LOCAL_AND_GLOBAL, **WIDE_GLOBALS, "num_kv_shared_layers": 2},
    "mimo_v2_flash": {
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_key_value_heads": 4,  # twice as many in layers with windows
    },
    "inkling2_vision": {"text_hidden_size": 64},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # transformers' cache rounds the width of queries up to 64
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 6,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
    "step3p5": {"sliding_window": 6},
    "ovis2": {"vocab_size": VOCABULARY, "hidden_size": 64},
    "paddleocr_vl_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 90},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 90},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1}},
    "mllama_text_model": {"num_hidden_layers": 4, "cross_attention_layers": [1]},
    "kosmos_2_5_text_model": {"pad_token_id": 1},
    # Their own encoders need another library; text does not use them.
    "fast_vlm": {"vision_config": VISION},
    "perception_lm": {"vision_config": {**VISION, "model_args": {"embed_dim": 64}}},
    "moshi": {"sliding_window": 128},  # unused by attention, but not by the cache of `generate`
    "muse_spark_audio": {"num_hidden_layers": 4},
    "molmo2_adapter": {"vision_feature_layer": [0, 0]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|visual token 000000|>": 4}},
    "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGAZ": 4}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "xmod": {"default_language": "en_XX", "is_decoder": True, "pad_token_id": 1},
    # Multimodal encoders and projectors with large default sizes.
    "cohere2_vision": {"alignment_intermediate_size": 64},
    # Ids of images and audio within the vocabulary, because every text's ids are compared with them.
    "gemma3n": {"image_token_id": 80, "audio_token_id": 88},
    "gemma3n_vision": {"architecture": "resnet10t", "hidden_size": 512, "vocab_offset": 80, "vocab_size": 8},
    "gemma3n_audio": {"vocab_offset": 88, "vocab_size": 13},
    "siglip_vision_model": {"hidden_size": 64, "num_attention_heads": 4},
    "qwen2_vl_vision": {"hidden_size": 64},
    "qwen2_5_omni_vision_encoder": {"hidden_size": 64, "num_heads": 4},
    "qwen2_5_vl_vision": {"hidden_size": 64, "num_heads": 4},
}


def tiny_configs(model_type: str) -> Iterator[Any]:
    """Tiny configs to try, in order: with fewer key/value heads than query heads, then with equal numbers."""
    from transformers import CONFIG_MAPPING

    whole = CONFIG_MAPPING[model_type]()
    name = next((name for name in ("text_config", "decoder_config") if hasattr(whole, name)), None)
    encoders = {part: shallow(config) for part, config in parts_of(whole).items() if part != name}
    for key_value_heads in _key_value_choices(whole if name is None else getattr(whole, name)):
        if name is None:
            yield _shrunk(whole, key_value_heads, encoders)
        else:
            text = _shrunk(getattr(whole, name), key_value_heads, {})
            yield type(whole)(**{name: text, **encoders, **SPECIAL.get(model_type, {})})


def shallow(encoder: Any) -> Any:
    """A multimodal encoder with one layer; most other sizes depend on each other, and text does not use it."""
    known = encoder.to_dict()
    layers = {name: size for names, size in ((DEPTHS, 1), (WIDTHS, 64)) for name in names if known.get(name)}
    layers |= {"layer_types": known["layer_types"][:1]} if known.get("layer_types") else {}
    inner = {part: shallow(config) for part, config in parts_of(encoder).items()}
    return type(encoder).from_dict({**known, **layers, **inner, **SPECIAL.get(encoder.model_type, {})})


def parts_of(config: Any) -> dict[str, Any]:
    """The configs inside a config."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part for name, part in parts.items() if isinstance(part, PreTrainedConfig)}


def _key_value_choices(config: Any) -> list[int]:
    known = config.to_dict()  # a config whose layers differ refuses to say what they differ in
    has_any = any(known.get(name) is not None for name in KEY_VALUE_HEADS)
    return [4, HEADS] if has_any and not known.get("kv_lora_rank") else [HEADS]


def _shrunk(config: Any, key_value_heads: int, encoders: dict[str, Any]) -> Any:
    known = config.to_dict()
    values = {name: size for name, size in SIZES.items() if known.get(name) is not None}
    values |= {name: on for name, on in OPTIONS.items() if name in known}
    values |= {name: key_value_heads for name in KEY_VALUE_HEADS if name in known}
    values |= {name: token for name, token in TOKENS.items() if known.get(name) is not None}
    values |= {"layer_types": _layer_types(known["layer_types"])} if known.get("layer_types") else {}
    if known.get("kv_lora_rank") is not None:  # here, head_dim is the size of the rotary part only
        values.pop("head_dim", None)
    values |= encoders | SPECIAL.get(config.model_type, {})
    if known.get("rope_parameters") and "rope_parameters" not in values:
        values["rope_parameters"] = _with_theta(copy.deepcopy(known["rope_parameters"]))
        if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
            values["rope_parameters"] |= _sections(values, values["rope_parameters"])
    if "layer_types" in values and "num_hidden_layers" in known:
        values["num_hidden_layers"] = len(values["layer_types"])
    return type(config)(**values)


def _with_theta(rope: dict[str, Any]) -> dict[str, Any]:
    """Set the base frequency where a config leaves it to the checkpoint."""
    if rope.get("rope_theta", 0) is None:
        rope["rope_theta"] = 10000.0
    return rope


def _sections(values: dict[str, Any], rope: dict[str, Any]) -> dict[str, list[int]]:
    """The split of a head's frequencies into those of time, height and width."""
    width = values.get("head_dim", values.get("hidden_size", 64) // HEADS)
    third, rest = divmod(int(width * rope.get("partial_rotary_factor", 1.0)) // 2, 3)
    return {"mrope_section": [third + rest, third, third]}


def _layer_types(types: list[str]) -> list[str]:
    """Each kind of layer once, in order of appearance, but at least two layers."""
    kinds = list(dict.fromkeys(types))
    return kinds * 2 if len(kinds) == 1 else kinds
