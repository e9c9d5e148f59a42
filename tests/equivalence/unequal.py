"""Tiny models whose layers differ: in key/value heads, in head widths, and in whose keys and values they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.equivalence.families import EXPERTS, LOCAL_AND_GLOBAL, SHAPE
from tests.equivalence.tiny_models import VOCABULARY, model_class, perturb

LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 6}
PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}
SHARED = {"num_kv_shared_layers": 2, "pad_token_id": 0}
WIDE_GLOBALS = {"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": (
        "gemma3n_text",
        {
            **LAYERS,
            **PER_LAYER_INPUTS,
            **SHARED,
            "head_dim": 16,
            "intermediate_size": [88] * 6,
            "activation_sparsity_pattern": [0.9, 0.6, 0.5, 0.0, 0.0, 0.0],
            "laurel_rank": 8,
            "altup_num_inputs": 3,
            "final_logit_softcapping": 30.0,
        },
    ),
    # As E2B and E4B: per-layer inputs, shared layers with feed-forward blocks twice as wide.
    "gemma4-small": (
        "gemma4_text",
        {
            **LAYERS,
            **PER_LAYER_INPUTS,
            **SHARED,
            "head_dim": 16,
            "global_head_dim": 32,
            "use_double_wide_mlp": True,
        },
    ),
    # As 31B: global layers with fewer and wider heads, whose keys are also the values.
    "gemma4-large": ("gemma4_text", {**LAYERS, **WIDE_GLOBALS, "hidden_size_per_layer_input": 0, "pad_token_id": 0}),
    # As 26B-A4B: experts beside the feed-forward block.
    "gemma4-experts": (
        "gemma4_text",
        {
            **LAYERS,
            **WIDE_GLOBALS,
            "hidden_size_per_layer_input": 0,
            "pad_token_id": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "gemma4_unified": ("gemma4_unified_text", {**LAYERS, **WIDE_GLOBALS, **SHARED}),
    # Twice as many query heads in layers with windows.
    "laguna": (
        "laguna",
        {
            **LOCAL_AND_GLOBAL,
            "head_dim": 16,
            "num_attention_heads_per_layer": [16, 8],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            **LOCAL_AND_GLOBAL,
            **EXPERTS,
            "num_key_value_heads": 2,  # four in layers with windows
            "head_dim": 24,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"],
            "attention_bias": True,
            "attention_value_scale": 0.7,
        },
    ),
}


def make_unequal(name: str, folder: Path) -> Any:
    """Save a tiny random model of `MODELS` and return transformers' own model of it."""
    from transformers import CONFIG_MAPPING

    model_type, values = MODELS[name]
    config = CONFIG_MAPPING[model_type](**{**SHAPE, **values})
    kind = model_class(config)
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    perturb(model)
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer, "layer_scalar"):
            layer.layer_scalar.fill_(0.7 + 0.1 * number)
    model.save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32).eval()
