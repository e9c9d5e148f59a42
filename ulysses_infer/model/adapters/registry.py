"""The adapter of each model type that needs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ulysses_infer.model.adapters.bloom import adapt_bloom
from ulysses_infer.model.adapters.dbrx import adapt_dbrx
from ulysses_infer.model.adapters.early_gpt import adapt_gpt, adapt_gpt_neo, adapt_gpt_neox_japanese
from ulysses_infer.model.adapters.falcon import adapt_falcon
from ulysses_infer.model.adapters.gpt_bigcode import adapt_gpt_bigcode
from ulysses_infer.model.adapters.gptj import adapt_codegen, adapt_gptj
from ulysses_infer.model.adapters.mpt import adapt_mpt
from ulysses_infer.model.adapters.xglm import adapt_xglm

ADAPTERS: dict[str, Callable[[Any], None]] = {
    "bloom": adapt_bloom,
    "codegen": adapt_codegen,
    "dbrx": adapt_dbrx,
    "falcon": adapt_falcon,
    "gpt_bigcode": adapt_gpt_bigcode,
    "gpt_neo": adapt_gpt_neo,
    "gpt_neox_japanese": adapt_gpt_neox_japanese,
    "gptj": adapt_gptj,
    "mpt": adapt_mpt,
    "openai-gpt": adapt_gpt,
    "xglm": adapt_xglm,
}


def adapt(model: Any) -> None:
    """Change `model` in place, before it is sharded, so that its attention runs through our attention function."""
    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is not None:
        adapter(model)
