"""`ModelSizes`: the numbers of a checkpoint's config.json that determine step times and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.head_layout import head_layout

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int4": 0.5625}
"""Bytes per weight of a quantised layer, scales of int4's groups included."""
RECURRENT_KINDS = frozenset({"linear_attention", "mamba", "recurrent", "conv"})


@dataclass(frozen=True)
class ModelSizes:
    """A decoder-only model. Widths are in elements."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    key_width: int
    value_width: int
    latent_width: int
    """What one token caches per layer with multi-head latent attention; 0: keys and values per head."""
    intermediate_size: int
    vocab_size: int
    has_tied_head: bool
    max_model_len: int
    dtype: str
    """Of matrix products: bf16, fp8, fp8_block or int4."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    num_expert_layers: int = 0
    num_recurrent_layers: int = 0
    state_elements: int = 0
    """Recurrent state of one sequence in one layer, over all heads."""
    num_window_layers: int = 0
    window: int = 0

    @property
    def num_attention_layers(self) -> int:
        """Layers with keys and values in the cache."""
        return self.num_layers - self.num_recurrent_layers

    @property
    def num_dense_layers(self) -> int:
        """Layers with a plain feed-forward block."""
        return self.num_layers - self.num_expert_layers

    @property
    def weight_bytes(self) -> float:
        """Bytes per weight of the layers' matrix products."""
        return WEIGHT_BYTES[self.dtype]

    def attention_heads(self, parts: int) -> int:
        """Query heads of one of `parts` parts, padding included."""
        return head_layout(parts, self.num_attention_heads, self.num_key_value_heads).query_slots

    def key_value_heads(self, parts: int) -> int:
        """KV heads of one of `parts` parts; at least one."""
        return head_layout(parts, self.num_attention_heads, self.num_key_value_heads).key_value_slots

    @property
    def attention_weights(self) -> int:
        """Weights of one attention layer's products."""
        heads, hidden = self.num_attention_heads, self.hidden_size
        return hidden * (heads + self.num_key_value_heads) * (self.key_width + self.value_width)

    @property
    def num_weights(self) -> float:
        """All weights of the model."""
        return self.layer_weights + self.expert_weights + self.embedding_weights

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding and, unless it is tied, of the head."""
        return self.vocab_size * self.hidden_size * (1 if self.has_tied_head else 2)

    @property
    def layer_weights(self) -> float:
        """Weights of all layers that tensor parallelism divides, except experts."""
        dense = 3 * self.hidden_size * self.intermediate_size * self.num_dense_layers
        shared = 3 * self.hidden_size * self.shared_width * self.num_expert_layers
        return self.attention_weights * self.num_layers + dense + shared

    @property
    def expert_weights(self) -> float:
        """Weights of all experts."""
        return 3.0 * self.hidden_size * self.expert_width * self.num_experts * self.num_expert_layers


def sizes_of(config: Any, dtype: str | None = None) -> ModelSizes:
    """The sizes in a transformers config. dtype: of products; None: what the checkpoint stores.

    Raises `ConfigError` if the config lacks a size.
    """
    text = config.get_text_config(decoder=True)
    hidden, heads = _need(text, "hidden_size"), _need(text, "num_attention_heads")
    head_width = getattr(text, "head_dim", None) or hidden // heads
    latent = getattr(text, "kv_lora_rank", None) or 0
    rope_width = getattr(text, "qk_rope_head_dim", None) or 0
    key_width = (getattr(text, "qk_nope_head_dim", 0) + rope_width) if latent else head_width
    kinds = list(getattr(text, "layer_types", None) or ())
    num_layers = _need(text, "num_hidden_layers")
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0
    return ModelSizes(
        model_type=config.model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        key_width=key_width,
        value_width=getattr(text, "v_head_dim", None) or head_width,
        latent_width=latent + rope_width if latent else 0,
        intermediate_size=_dense_width(text),
        vocab_size=_need(text, "vocab_size"),
        has_tied_head=bool(getattr(text, "tie_word_embeddings", False)),
        max_model_len=getattr(text, "max_position_embeddings", None) or 1 << 17,
        dtype=dtype or _stored_dtype(config, text),
        **_experts(text, num_layers),
        num_recurrent_layers=sum(kind in RECURRENT_KINDS for kind in kinds),
        state_elements=_state_elements(text),
        num_window_layers=sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds),
        window=window,
    )


def _need(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    if not isinstance(value, int):
        raise ConfigError(f"the config of model type {text.model_type!r} has no {name}, which planning needs")
    return value


def _dense_width(text: Any) -> int:
    """llama4 keeps the width of its dense layers under a name of its own."""
    width = getattr(text, "intermediate_size_mlp", None) or getattr(text, "intermediate_size", None)
    return int(width[0] if isinstance(width, list) else width or 4 * text.hidden_size)


def _experts(text: Any, num_layers: int) -> dict[str, int]:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((getattr(text, name) for name in names if getattr(text, name, None)), 0)
    if not count:
        return {}
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", None)
    if shared is None:
        shared = width * (getattr(text, "n_shared_experts", 0) or (1 if text.model_type.startswith("llama4") else 0))
    step = getattr(text, "interleave_moe_layer_step", None) or getattr(text, "decoder_sparse_step", None) or 1
    first = getattr(text, "first_k_dense_replace", None) or 0
    return {
        "num_experts": count,
        "experts_per_token": getattr(text, "num_experts_per_tok", None) or 1,
        "expert_width": width,
        "shared_width": shared,
        "num_expert_layers": (num_layers - first) // step,
    }


def _state_elements(text: Any) -> int:
    """Of the gated delta rule, or of Mamba 2."""
    if getattr(text, "linear_num_value_heads", None):
        return int(text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim)
    heads, state = getattr(text, "mamba_n_heads", None), getattr(text, "mamba_d_state", None)
    return int(heads * text.mamba_d_head * state) if heads and state else 0


def _stored_dtype(config: Any, text: Any) -> str:
    quantization = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if quantization is None:
        return "bf16"
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(values.get("quant_method"))
    if method in ("gptq", "awq"):
        return "int4"
    if method == "fp8":
        return "fp8_block" if values.get("weight_block_size") else "fp8"
    groups = values.get("config_groups") or {}
    bits = {int((group.get("weights") or {}).get("num_bits", 16)) for group in groups.values()}
    return "int4" if bits == {4} else "fp8" if method == "compressed-tensors" else "bf16"
