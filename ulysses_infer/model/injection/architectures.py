"""The lists of supported and refused architectures. Supported ones have passed the equivalence suite."""

from __future__ import annotations

import difflib
from typing import Any

from ulysses_infer.errors import UnsupportedModelError

RECURRENT = "it has recurrent or convolutional layers, whose state is not in the KV cache"
OWN_ATTENTION = "its attention does not use transformers' attention interface, so it cannot be sharded or cached"
ALIBI = "it uses ALiBi position biases, which the attention backends do not support"
DECODER_HALF = "it is the decoder half of an encoder-decoder model"
SELECTED_KEYS = "its attention selects keys by a learned index"
CROSS_ATTENTION = "its layers cross-attend to encoded images, which the KV cache does not hold"
NEEDS_AN_IMAGE = "it requires an image input"
SPEECH_PIPELINE = "it is a pipeline of speech models; serve its thinker model instead"
DRAFT_MODEL = "it is a draft model, whose layers read the keys and values of another model"

# Refused even with allow_unverified: these models fail, or run but give wrong results.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "bailing_hybrid",
            "bamba",
            "falcon_h1",
            "falcon_mamba",
            "glm5_next",
            "granitemoehybrid",
            "inkling2",
            "inkling2_text",
            "inkling_mm_model",
            "inkling_text",
            "jamba",
            "kimi_linear",
            "lfm2",
            "lfm2_moe",
            "lfm2_vl",
            "lfm3",
            "lfm3_vl",
            "mamba",
            "mamba2",
            "minicpm_ocr",
            "minicpmv4_6",
            "minicpmv4_7",
            "minimax",
            "nemo_speechlm",
            "nemotron_h",
            "nemotron_h_omni",
            "olmo_hybrid",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen4_exp",
            "qwen4_exp_text",
            "recurrent_gemma",
            "rwkv",
            "xlstm",
            "zamba",
            "zamba2",
            "zaya",
        ),
        RECURRENT,
    ),
    **dict.fromkeys(("codegen", "gpt_neo", "gpt_neox_japanese", "gptj", "openai-gpt", "trocr", "xglm"), OWN_ATTENTION),
    **dict.fromkeys(("bloom", "falcon", "mpt"), ALIBI),
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "florence2",
            "marian",
            "mbart",
            "musicgen",
            "musicgen_melody",
            "mvp",
            "pegasus",
            "pix2struct",
            "plbart",
            "pp_formulanet",
            "prophetnet",
            "t5gemma2",
            "udop",
            "vision-encoder-decoder",
            "whisper",
        ),
        DECODER_HALF,
    ),
    **dict.fromkeys(
        (
            "axk2",
            "deepseek_v32",
            "deepseek_v4",
            "dots3_note",
            "dots3_note_text",
            "glm_moe_dsa",
            "hy_v4",
            "mistral_large4",
        ),
        SELECTED_KEYS,
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), DRAFT_MODEL),
    **dict.fromkeys(("evolla", "idefics", "mllama"), CROSS_ATTENTION),
    **dict.fromkeys(("blip", "blip-2", "instructblip", "instructblipvideo", "pi0", "shieldgemma2"), NEEDS_AN_IMAGE),
    "blt": "its layers run over byte patches, whose number depends on the text",
    "chameleon": "it masks image tokens by their index in the logits, which are sharded over the ranks",
    "diffllama": "its differential attention mixes pairs of heads across shards",
    "doge": "its attention masks keys by value-dependent scores",
    "diffusion_gemma": "it generates blocks of tokens by diffusion, not autoregressively",
    "hrm_text": "it runs each layer several times per step, but the cache has one entry per layer",
    "paligemma": "its prompts use bidirectional attention, which rules out chunked prefill and prefix caching",
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), SPEECH_PIPELINE),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), "it derives positions from its padding token and ignores position_ids"),
    **dict.fromkeys(("kyutai_speech_to_text", "voxtral_realtime"), "it takes an audio input with every token"),
    "reformer": "it uses locality-sensitive hashing attention",
}

# Shown to be equivalent to transformers by docs/generate/sweep_architectures.py, which writes docs/models.md.
VERIFIED: frozenset[str] = frozenset(
    (
        "afmoe",
        "apertus",
        "arcee",
        "aria",
        "aria_text",
        "axk1",
        "aya_vision",
        "beam",
        "biogpt",
        "bitnet",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cohere2_vision",
        "cohere_compass",
        "cohere_compass_text",
        "cosmos3_edge",
        "cosmos3_omni",
        "cwm",
        "deepseek_ocr2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "dots1",
        "emu3",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "exaone4",
        "exaone4_5",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "fun_asr_nano",
        "fuyu",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm46v",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v",
        "glm4v_moe",
        "glm_ocr",
        "glmasr",
        "glmga",
        "got_ocr2",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granite4_vision",
        "granite_docling",
        "granite_speech",
        "granite_speech_plus",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hunyuan_vl",
        "hy_v3",
        "hyperclovax",
        "hyperclovax_vision_v2",
        "idefics2",
        "idefics3",
        "internlm3",
        "internvl",
        "iquestcoder",
        "jais2",
        "janus",
        "kimi_k25",
        "kolibri1",
        "laguna",
        "lighton_ocr",
        "llama",
        "llama4",
        "llama4_text",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "longcat_flash",
        "mellum",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m2",
        "minimax_m3_vl",
        "minimax_m3_vl_text",
        "ministral",
        "ministral3",
        "mistral",
        "mistral3",
        "mistral4",
        "mixtral",
        "modernbert-decoder",
        "molmo2",
        "moss_transcribe_diarize",
        "muse_glimmer",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "ovis2",
        "paddleocr_vl",
        "persimmon",
        "phi",
        "phi3",
        "phi4_multimodal",
        "phimoe",
        "pp_chart2table",
        "qianfan_ocr",
        "qwen2",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_asr",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
        "seed_oss",
        "smollm3",
        "smolvlm",
        "solar_open",
        "stablelm",
        "starcoder2",
        "step3p7",
        "vaultgemma",
        "vibevoice_asr",
        "video_llama_3",
        "video_llava",
        "vipllava",
        "voxtral",
        "youtu",
    )
)


def check_supported(config: Any, allow_unverified: bool) -> None:
    """Raise `UnsupportedModelError`, with the model type and the reason, unless it can be served."""
    model_types = model_types_of(config)
    for model_type in model_types:
        if model_type in REFUSED:
            raise UnsupportedModelError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    if config.model_type == "gpt_bigcode" and not config.multi_query:
        raise UnsupportedModelError(
            "model type 'gpt_bigcode' with multi_query=false interleaves q, k and v per head, which no sharding "
            "rule covers; use a multi-query checkpoint"
        )
    unverified = [model_type for model_type in model_types if model_type not in VERIFIED]
    if unverified and not allow_unverified:
        near = difflib.get_close_matches(unverified[0], VERIFIED, n=1)
        hint = f" (nearest verified: {near[0]})" if near else ""
        raise UnsupportedModelError(
            f"model type {unverified[0]!r} has not been verified against transformers{hint}; "
            "set model.allow_unverified=true to serve it at your own risk (see docs/models.md)"
        )


def model_types_of(config: Any) -> list[str]:
    """The model's type and, for a multimodal model, also the type of its language model if that exists on its own.

    For example, llava around opt is supported only if both llava and opt are.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    inner = config.get_text_config(decoder=True).model_type
    return list(dict.fromkeys((config.model_type, *((inner,) if inner in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ()))))
