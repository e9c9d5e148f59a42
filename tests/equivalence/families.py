"""A tiny config of each tested family: shapes that matter to a layout, and the features of the family."""

from __future__ import annotations

from typing import Any

from tests.equivalence.tiny_models import VOCABULARY

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LOCAL_AND_GLOBAL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16, "sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, **EXPERTS},
    "mixtral": {"sliding_window": 6, **EXPERTS, "intermediate_size": 32},
    "gemma2": {
        **LOCAL_AND_GLOBAL,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {**LOCAL_AND_GLOBAL, "head_dim": 16},
    "phi3": {"sliding_window": 6, "original_max_position_embeddings": 128},
    "olmo2": {"num_key_value_heads": 8},
    "gpt_neox": {"num_key_value_heads": None},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "glm4": {"head_dim": 16, "num_key_value_heads": 2},
    "cohere2": {**LOCAL_AND_GLOBAL, "head_dim": 16, "logit_scale": 0.3},
    "gpt_oss": {**LOCAL_AND_GLOBAL, **EXPERTS, "head_dim": 16, "intermediate_size": 32},
    "starcoder2": {"sliding_window": 6, "num_key_value_heads": 2},
}

# Features that none of the families has, each tested on one layout.
FEATURES: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3},  # a norm with weights of its own for every head
    "gpt2": {"num_key_value_heads": None, "head_dim": None},  # weights stored transposed, q, k and v packed
    "beam": {**LOCAL_AND_GLOBAL, "head_dim": 16, "moe_intermediate_size": 32, **EXPERTS},  # one bias per head
    "bitnet": {},  # a norm over the heads' outputs
    "modernbert-decoder": {
        **LOCAL_AND_GLOBAL,
        "num_key_value_heads": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },  # outputs called Wo, inputs of the feed-forward packed as Wi
}

LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

# Mixtures of experts, each tested with its experts in every placement.
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": FAMILIES["mixtral"],
    "qwen2_moe": {
        **ROUTED,
        "num_experts": 4,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "deepseek_v2": {
        **LATENT,
        **ROUTED,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **LATENT,
        **ROUTED,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "llama4_text": {
        "head_dim": 16,
        "attention_chunk_size": 6,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "floor_scale": 4,
        "attn_scale": 0.5,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 40,
        "intermediate_size": 32,
        **EXPERTS,
    },
    "gpt_oss": FAMILIES["gpt_oss"],
    "granitemoe": {**EXPERTS, "intermediate_size": 32, "attention_multiplier": 0.3, "residual_multiplier": 0.4},
    "glm4_moe": {
        **ROUTED,
        "head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_interval": 1,
    },
    "minimax_m2": {**EXPERTS, "head_dim": 16, "intermediate_size": 32},
}
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def with_experts(model_type: str, num_experts: int) -> dict[str, int]:
    """The config change that sets the number of experts under the family's own name for it."""
    return {name: num_experts for name in NUM_EXPERTS if name in EXPERT_FAMILIES[model_type]}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The tiny config of a family, with some of its values changed."""
    from transformers import CONFIG_MAPPING

    values = {**SHAPE, **{**FAMILIES, **FEATURES, **EXPERT_FAMILIES}[model_type], **changes}
    return CONFIG_MAPPING[model_type](**{name: value for name, value in values.items() if value is not _absent(name)})


def _absent(name: str) -> Any:
    """Special tokens really are None; any other None leaves the config's own default."""
    return ... if name.endswith("_token_id") else None
