"""The lists of supported and refused architectures. Supported ones have passed the equivalence suite."""

from __future__ import annotations

import difflib
from typing import Any

from ulysses_infer.errors import UnsupportedModelError

DECODER_HALF = "it is the decoder half of an encoder-decoder model"
CROSS_ATTENTION = "its layers cross-attend to encoded images, which the KV cache does not hold"
NEEDS_AN_IMAGE = "it requires an image input"
DRAFT_MODEL = "it is a draft model, whose layers read the keys and values of another model"

# Refused even with allow_unverified: these models fail, or run but give wrong results.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "florence2",
            "musicgen",
            "musicgen_melody",
            "pix2struct",
            "pp_formulanet",
            "prophetnet",
            "t5gemma2",
            "trocr",
            "udop",
            "vision-encoder-decoder",
            "whisper",
        ),
        DECODER_HALF,
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), DRAFT_MODEL),
    **dict.fromkeys(("evolla", "idefics"), CROSS_ATTENTION),
    **dict.fromkeys(
        ("blip", "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "pi0", "shieldgemma2"), NEEDS_AN_IMAGE
    ),
    "blt": "its layers run over byte patches, whose number depends on the text",
    "cpmant": "it puts learned tokens before every text, and its attention sees all of them and all of the prompt",
    "doge": "its attention masks keys by value-dependent scores",
    "diffusion_gemma": "it generates blocks of tokens by diffusion, not autoregressively",
    "hrm_text": "its prompts use bidirectional attention, and it runs each layer several times per step",
    "paligemma": "its prompts use bidirectional attention, which rules out chunked prefill and prefix caching",
    **dict.fromkeys(("kyutai_speech_to_text", "voxtral_realtime"), "it takes an audio input with every token"),
    **dict.fromkeys(
        ("xlm", "xlnet"), "it generates by filling in a masked token behind the text, not autoregressively"
    ),
    "reformer": "it uses locality-sensitive hashing attention",
}

# Encoders that are language models with `is_decoder: true`.
ENCODERS: tuple[str, ...] = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)

# Encoder-decoders whose decoder alone is a language model, in checkpoints with `is_encoder_decoder: false`.
DECODERS: tuple[str, ...] = (
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
)

# Not in transformers: `model/definitions` has them. Shown to be equivalent to plain forwards in the tests.
DEFINED: frozenset[str] = frozenset(("llama_swiftkv",))

# Shown to be equivalent to transformers by docs/generate/sweep_architectures.py, which writes docs/models.md.
VERIFIED: frozenset[str] = frozenset(
    (
        "afmoe",
        "apertus",
        "arcee",
        "aria",
        "aria_text",
        "axk1",
        "axk2",
        "aya_vision",
        "bailing_hybrid",
        "bamba",
        "bart",
        "beam",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "biogpt",
        "bitnet",
        "blenderbot",
        "blenderbot-small",
        "bloom",
        "camembert",
        "chameleon",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cohere2_vision",
        "cohere_compass",
        "cohere_compass_text",
        "cosmos3_edge",
        "cosmos3_omni",
        "ctrl",
        "cwm",
        "data2vec-text",
        "dbrx",
        "deepseek_ocr2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "diffllama",
        "dots1",
        "dots3_note",
        "dots3_note_text",
        "electra",
        "emu3",
        "ernie",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "exaone4",
        "exaone4_5",
        "exaone_moe",
        "falcon",
        "falcon_h1",
        "falcon_mamba",
        "fast_vlm",
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
        "git",
        "glm",
        "glm4",
        "glm46v",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v",
        "glm4v_moe",
        "glm5_next",
        "glm_moe_dsa",
        "glm_ocr",
        "glmasr",
        "glmga",
        "got_ocr2",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite",
        "granite4_vision",
        "granite_docling",
        "granite_speech",
        "granite_speech_plus",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hunyuan_vl",
        "hy_v3",
        "hy_v4",
        "hyperclovax",
        "hyperclovax_vision_v2",
        "idefics2",
        "idefics3",
        "inkling2",
        "inkling2_text",
        "inkling_mm_model",
        "inkling_text",
        "internlm3",
        "internvl",
        "iquestcoder",
        "jais2",
        "jamba",
        "janus",
        "jetmoe",
        "kimi_k25",
        "kimi_linear",
        "kolibri1",
        "kosmos-2.5",
        "laguna",
        "lfm2",
        "lfm2_moe",
        "lfm2_vl",
        "lfm3",
        "lfm3_vl",
        "lighton_ocr",
        "llama",
        "llama4",
        "llama4_text",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "longcat_flash",
        "mamba",
        "mamba2",
        "marian",
        "mbart",
        "megatron-bert",
        "mellum",
        "mimo_v2_flash",
        "minicpm3",
        "minicpm_ocr",
        "minicpmv4_6",
        "minicpmv4_7",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl",
        "minimax_m3_vl_text",
        "ministral",
        "ministral3",
        "mistral",
        "mistral3",
        "mistral4",
        "mistral_large4",
        "mixtral",
        "mllama",
        "modernbert-decoder",
        "molmo2",
        "moshi",
        "moss_transcribe_diarize",
        "mpt",
        "muse_glimmer",
        "mvp",
        "nanochat",
        "nemo_speechlm",
        "nemotron",
        "nemotron_h",
        "nemotron_h_omni",
        "olmo",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "openai-gpt",
        "opt",
        "ovis2",
        "paddleocr_vl",
        "pegasus",
        "perception_lm",
        "persimmon",
        "phi",
        "phi3",
        "phi4_multimodal",
        "phimoe",
        "plbart",
        "pp_chart2table",
        "qianfan_ocr",
        "qwen2",
        "qwen2_5_omni",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_asr",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen4_exp",
        "qwen4_exp_text",
        "recurrent_gemma",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "rwkv",
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
        "xglm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlstm",
        "xmod",
        "youtu",
        "zamba",
        "zamba2",
        "zaya",
    )
)


def check_supported(
    config: Any, allow_unverified: bool, how_to_allow: str = "set model.allow_unverified=true to serve it"
) -> None:
    """Raise `UnsupportedModelError`, with the model type and the reason, unless it can be served.

    how_to_allow: for the message, how an unverified model is allowed.
    """
    model_types = model_types_of(config)
    for model_type in model_types:
        if model_type in REFUSED:
            raise UnsupportedModelError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    _check_role(config)
    unverified = [model_type for model_type in model_types if model_type not in VERIFIED | DEFINED]
    if unverified and not allow_unverified:
        near = difflib.get_close_matches(unverified[0], VERIFIED, n=1)
        hint = f" (nearest verified: {near[0]})" if near else ""
        raise UnsupportedModelError(
            f"model type {unverified[0]!r} has not been verified against transformers{hint}; "
            f"{how_to_allow} at your own risk (see docs/models.md)"
        )


def _check_role(config: Any) -> None:
    """Raise `UnsupportedModelError` for encoders, and for decoders that read one."""
    if config.model_type in ENCODERS and not config.is_decoder:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is an encoder; only checkpoints with is_decoder: true are served"
        )
    if config.model_type in DECODERS and config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is an encoder-decoder; only its decoder alone is served, from "
            "checkpoints with is_encoder_decoder: false, as its ForCausalLM class saves them"
        )


def model_types_of(config: Any) -> list[str]:
    """The model's type and, for a multimodal model, also the type of its language model if that exists on its own.

    For example, llava around opt is supported only if both llava and opt are.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    inner = config.get_text_config(decoder=True).model_type
    return list(dict.fromkeys((config.model_type, *((inner,) if inner in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ()))))
