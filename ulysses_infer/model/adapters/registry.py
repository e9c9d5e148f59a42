"""The adapter of each model type that needs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ulysses_infer.model.adapters.base import SeparateAttention, replace_all
from ulysses_infer.model.adapters.bert import adapt_bert, adapt_big_bird, adapt_roformer
from ulysses_infer.model.adapters.bloom import adapt_bloom
from ulysses_infer.model.adapters.dbrx import adapt_dbrx
from ulysses_infer.model.adapters.decoders import adapt_decoder, adapt_mvp
from ulysses_infer.model.adapters.diffllama import adapt_diffllama
from ulysses_infer.model.adapters.early_gpt import adapt_gpt, adapt_gpt_neo, adapt_gpt_neox_japanese
from ulysses_infer.model.adapters.falcon import adapt_falcon
from ulysses_infer.model.adapters.gptj import adapt_codegen, adapt_gptj
from ulysses_infer.model.adapters.jetmoe import adapt_jetmoe
from ulysses_infer.model.adapters.mpt import adapt_mpt
from ulysses_infer.model.adapters.multimodal import adapt_chameleon, adapt_kosmos, adapt_mllama
from ulysses_infer.model.adapters.projections import adapt_ctrl, adapt_gpt_bigcode, adapt_moshi
from ulysses_infer.model.adapters.sparse.deepseek_v4 import adapt_deepseek_v4
from ulysses_infer.model.adapters.sparse.pooled_index import adapt_glm5_next, adapt_qwen4_exp
from ulysses_infer.model.adapters.stateful.inkling import adapt_inkling, adapt_inkling2
from ulysses_infer.model.adapters.stateful.recurrent_gemma import adapt_recurrent_gemma
from ulysses_infer.model.adapters.stateful.rwkv import adapt_rwkv
from ulysses_infer.model.adapters.stateful.xlstm import adapt_xlstm
from ulysses_infer.model.adapters.stateful.zamba import adapt_zamba
from ulysses_infer.model.adapters.stateful.zaya import adapt_zaya
from ulysses_infer.model.injection.architectures import DECODERS, ENCODERS

ADAPTERS: dict[str, Callable[[Any], None]] = {
    **dict.fromkeys(ENCODERS, adapt_bert),
    **dict.fromkeys(DECODERS, adapt_decoder),
    "big_bird": adapt_big_bird,
    "bloom": adapt_bloom,
    "chameleon": adapt_chameleon,
    "codegen": adapt_codegen,
    "ctrl": adapt_ctrl,
    "dbrx": adapt_dbrx,
    "deepseek_v4": adapt_deepseek_v4,
    "diffllama": adapt_diffllama,
    "falcon": adapt_falcon,
    "git": adapt_bert,
    "glm5_next_text": adapt_glm5_next,
    "gpt_bigcode": adapt_gpt_bigcode,
    "gpt_neo": adapt_gpt_neo,
    "gpt_neox_japanese": adapt_gpt_neox_japanese,
    "gptj": adapt_gptj,
    "inkling2_text": adapt_inkling2,
    "inkling_text": adapt_inkling,
    "jetmoe": adapt_jetmoe,
    "kosmos_2_5_text_model": adapt_kosmos,
    "mllama_text_model": adapt_mllama,
    "moshi": adapt_moshi,
    "mpt": adapt_mpt,
    "mvp": adapt_mvp,
    "openai-gpt": adapt_gpt,
    "qwen4_exp_text": adapt_qwen4_exp,
    "recurrent_gemma": adapt_recurrent_gemma,
    "roformer": adapt_roformer,
    **dict.fromkeys(("zamba", "zamba2"), adapt_zamba),
    "rwkv": adapt_rwkv,
    "xlstm": adapt_xlstm,
    "zaya": adapt_zaya,
    "xglm": lambda model: replace_all(model, "XGLMAttention", SeparateAttention),
}


def adapt(model: Any) -> None:
    """Change `model` in place, before it is sharded, so that its attention runs through our attention function."""
    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is not None:
        adapter(model)
