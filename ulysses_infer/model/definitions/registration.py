"""Registers the models of this folder with transformers, as if it had them."""

from __future__ import annotations

import functools


@functools.cache
def register_definitions() -> None:
    """Let transformers' `Auto` classes find the configs and models of this folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ulysses_infer.model.definitions.llama_swiftkv import LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM

    AutoConfig.register(LlamaSwiftKVConfig.model_type, LlamaSwiftKVConfig, exist_ok=True)
    AutoModelForCausalLM.register(LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM, exist_ok=True)
