"""Which architectures are served. Fails closed: a family is served once the equivalence suite has proved it."""

from __future__ import annotations

import difflib
from typing import Any

from ulysses_infer.errors import UnsupportedModelError

# Run without an error in a plain injection and give wrong answers, or cannot work at all: never served.
REFUSED: dict[str, str] = {
    "jamba": "it has recurrent (mamba) layers whose state is not in the KV cache",
    "bamba": "it has recurrent (mamba) layers whose state is not in the KV cache",
    "falcon_h1": "it has recurrent (mamba) layers whose state is not in the KV cache",
    "granitemoehybrid": "it has recurrent (mamba) layers whose state is not in the KV cache",
    "zamba": "it has recurrent (mamba) layers whose state is not in the KV cache",
    "zamba2": "it has recurrent (mamba) layers whose state is not in the KV cache",
    "nemotron_h": "it has recurrent (mamba) layers whose state is not in the KV cache",
    "diffllama": "its differential attention mixes pairs of heads across shards",
    "doge": "its attention masks keys by value-dependent scores",
    "hrm_text": "it runs its layers a data-dependent number of times",
}

VERIFIED: frozenset[str] = frozenset(
    """
    llama mistral qwen2 qwen3 qwen3_moe mixtral gemma2 gemma3_text phi3 olmo2 gpt_neox granite glm4 cohere2 gpt_oss
    starcoder2
    """.split()
)


def check_supported(config: Any, allow_unverified: bool) -> None:
    """Raise `UnsupportedModelError`, by name and reason, unless this architecture may be served."""
    model_type = config.get_text_config(decoder=True).model_type
    if model_type in REFUSED:
        raise UnsupportedModelError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UnsupportedModelError(
            f"the checkpoint is quantized ({method}), which is not available yet; use its bfloat16 release"
        )
    if model_type not in VERIFIED and not allow_unverified:
        near = difflib.get_close_matches(model_type, VERIFIED, n=1)
        hint = f" (nearest verified: {near[0]})" if near else ""
        raise UnsupportedModelError(
            f"model type {model_type!r} has not been proved equal to transformers{hint}; "
            "set model.allow_unverified=true to serve it at your own risk (see docs/models.md)"
        )
