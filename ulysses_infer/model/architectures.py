"""Which architectures are served. Fails closed: a family is served once the equivalence suite has proved it."""

from __future__ import annotations

import difflib
from typing import Any

from ulysses_infer.errors import UnsupportedModelError

RECURRENT = "it has recurrent or convolutional layers, whose state is not in the KV cache"
OWN_ATTENTION = "its attention does not go through transformers' attention interface, so it cannot be sharded or cached"
ALIBI = "it biases attention by distance (ALiBi), which the attention backends do not do"
DECODER_HALF = "it is the decoder half of an encoder-decoder model"
SELECTED_KEYS = "its attention selects keys by a learned index"
UNEQUAL_LAYERS = "its layers differ in the number or width of their key/value heads"

# Never served, whatever is asked: run in a plain injection and give wrong answers, or cannot work at all.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe",
            "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe",
            "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma",
            "rwkv", "xlstm", "zamba", "zamba2",
        ),
        RECURRENT,
    ),
    **dict.fromkeys(
        ("codegen", "gpt_neo", "gpt_neox_japanese", "gptj", "openai-gpt", "trocr", "xglm"), OWN_ATTENTION
    ),
    **dict.fromkeys(("bloom", "falcon", "mpt"), ALIBI),
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
         "prophetnet", "whisper"),
        DECODER_HALF,
    ),
    **dict.fromkeys(("axk2", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "hy_v4"), SELECTED_KEYS),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "mimo_v2_flash"),
        UNEQUAL_LAYERS,
    ),
    "diffllama": "its differential attention mixes pairs of heads across shards",
    "doge": "its attention masks keys by value-dependent scores",
    "hrm_text": "it runs each layer several times a step, and the cache has one place a layer",
}  # fmt: skip

# Proved equal to transformers by tools/sweep_architectures.py, which writes docs/models.md.
VERIFIED: frozenset[str] = frozenset(
    (
        "afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "cohere", "cohere2",
        "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4",
        "exaone_moe", "flex_olmo", "flint", "fuyu", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4",
        "glm4_moe", "glm4_moe_lite", "got_ocr2", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
        "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium",
        "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2",
        "kolibri1", "laguna", "llama", "llama4", "llama4_text", "longcat_flash", "mellum", "minicpm3",
        "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral",
        "modernbert-decoder", "moss_transcribe_diarize", "nanochat", "nemotron", "olmo", "olmo2", "olmo3",
        "olmoe", "opt", "persimmon", "phi", "phi3", "phi4_multimodal", "phimoe", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
    )
)  # fmt: skip


def check_supported(config: Any, allow_unverified: bool) -> None:
    """Raise `UnsupportedModelError`, by name and reason, unless this architecture may be served."""
    model_types = list(dict.fromkeys((config.model_type, config.get_text_config(decoder=True).model_type)))
    for model_type in model_types:
        if model_type in REFUSED:
            raise UnsupportedModelError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    model_type = config.model_type
    if model_type == "gpt_bigcode" and not config.multi_query:
        raise UnsupportedModelError(
            "model type 'gpt_bigcode' with multi_query=false packs q, k and v head by head, which no sharding rule "
            "knows; use a multi-query checkpoint"
        )
    if model_type not in VERIFIED and not allow_unverified:
        near = difflib.get_close_matches(model_type, VERIFIED, n=1)
        hint = f" (nearest verified: {near[0]})" if near else ""
        raise UnsupportedModelError(
            f"model type {model_type!r} has not been proved equal to transformers{hint}; "
            "set model.allow_unverified=true to serve it at your own risk (see docs/models.md)"
        )
