"""`ModelSizes`: the numbers of a checkpoint's config.json that determine step times and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.head_layout import head_layout
from ulysses_infer.planning.recurrent import (
    KINDS_WITHOUT_ATTENTION,
    NO_STATES,
    RECURRENT_KINDS,
    RecurrentSizes,
    recurrent_sizes,
)

MOST_LAYERS = 10_000
WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int4": 0.5625}
"""Bytes per weight of a quantised layer, scales of int4's groups included."""


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
    num_attention_layers: int = 0
    """Layers with keys and values in the cache."""
    num_dense_layers: int = 0
    """Layers with a plain feed-forward block."""
    num_recurrent_layers: int = 0
    recurrent: RecurrentSizes = NO_STATES
    """One of them."""
    num_later_layers: int = 0
    """Layers at the end that only tokens whose logits are needed run through (SwiftKV)."""
    num_reading_layers: int = 0
    """Attention layers that read the keys and values of another layer."""
    num_window_layers: int = 0
    window: int = 0
    selected: int = 0
    """Cached tokens that each token attends to, chosen by an index (learned sparse attention); 0: all."""
    index_heads: int = 0
    index_width: int = 0
    """Of one head of the index, and what one token caches for it per layer."""
    expert_imbalance: float = 1.0
    """Tokens of the rank with the busiest experts over the mean of all ranks, from uneven routing."""

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
    def num_caching_layers(self) -> int:
        """Layers that cache keys and values of their own."""
        return self.num_attention_layers - self.num_reading_layers

    @property
    def key_value_weights(self) -> int:
        """Weights of the products that make keys and values in one attention layer."""
        return self.hidden_size * self.num_key_value_heads * (self.key_width + self.value_width)

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
        attention = self.attention_weights * self.num_attention_layers
        attention -= self.key_value_weights * self.num_reading_layers
        recurrent = self.recurrent.weights(self.hidden_size) * self.num_recurrent_layers
        return attention + recurrent + dense + shared

    @property
    def expert_weights(self) -> float:
        """Weights of all experts."""
        return 3.0 * self.hidden_size * self.expert_width * self.num_experts * self.num_expert_layers


def sizes_of(config: Any, dtype: str | None = None) -> ModelSizes:
    """The sizes in a transformers config. dtype: of products; None: what the checkpoint stores.

    Raises `ConfigError` if the config lacks a size.
    """
    text = config.get_text_config(decoder=True)
    hidden, num_layers = _need(text, "hidden_size"), _need(text, "num_hidden_layers")
    if num_layers > MOST_LAYERS:
        raise ConfigError(
            f"the config of model type {text.model_type!r} has num_hidden_layers = {num_layers}; at most {MOST_LAYERS} "
            "are planned"
        )
    kinds = _layer_kinds(text, num_layers)
    attends = any(kind not in KINDS_WITHOUT_ATTENTION for kind in kinds)
    heads = _need(text, "num_attention_heads") if attends else 1
    head_width = getattr(text, "head_dim", None) or hidden // heads
    latent = getattr(text, "kv_lora_rank", None) or 0
    rope_width = getattr(text, "qk_rope_head_dim", None) or 0
    key_width = (getattr(text, "qk_nope_head_dim", 0) + rope_width) if latent else head_width
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0
    return ModelSizes(
        model_type=config.model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=(getattr(text, "num_key_value_heads", None) or heads) if attends else 1,
        key_width=key_width,
        value_width=getattr(text, "v_head_dim", None) or head_width,
        latent_width=latent + rope_width if latent else 0,
        intermediate_size=_dense_width(text),
        vocab_size=_need(text, "vocab_size"),
        has_tied_head=bool(getattr(text, "tie_word_embeddings", False)),
        max_model_len=getattr(text, "max_position_embeddings", None) or 1 << 17,
        dtype=dtype or _stored_dtype(config, text),
        **_feed_forward(text, kinds),
        num_attention_layers=sum(kind not in KINDS_WITHOUT_ATTENTION for kind in kinds),
        num_recurrent_layers=sum(kind in RECURRENT_KINDS for kind in kinds),
        recurrent=_recurrent(text, frozenset(kinds)),
        **_later_layers(text),
        num_window_layers=sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds),
        window=window,
        selected=getattr(text, "index_topk", None) or 0,
        index_heads=getattr(text, "index_n_heads", None) or 0,
        index_width=getattr(text, "index_head_dim", None) or 0,
    )


def _need(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    if not isinstance(value, int):
        raise ConfigError(f"the config of model type {text.model_type!r} has no {name}, which planning needs")
    if value < 1:
        raise ConfigError(f"the config of model type {text.model_type!r} has {name} = {value}; it is at least 1")
    return value


def _dense_width(text: Any) -> int:
    """llama4 keeps the width of its dense layers under a name of its own."""
    width = getattr(text, "intermediate_size_mlp", None) or getattr(text, "intermediate_size", None)
    return int(width[0] if isinstance(width, list) else width or 4 * text.hidden_size)


def _layer_kinds(text: Any, num_layers: int) -> list[str]:
    """The kind of every layer; attention, if the config does not say."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    return list(kinds or ["full_attention"] * num_layers)


def _later_layers(text: Any) -> dict[str, int]:
    sources: dict[int, int] = getattr(text, "key_value_sources", {})
    reading = sum(layer != source for layer, source in sources.items())
    return {"num_later_layers": len(sources), "num_reading_layers": reading}


def _recurrent(text: Any, kinds: frozenset[str]) -> RecurrentSizes:
    if not kinds & RECURRENT_KINDS:
        return NO_STATES
    found = recurrent_sizes(text, kinds)
    if found is None:
        raise ConfigError(f"planning does not know what the recurrent layers of model type {text.model_type!r} keep")
    return found


def _feed_forward(text: Any, kinds: list[str]) -> dict[str, int]:
    """Dense blocks and experts. Most layers have one after their attention or recurrence; in some models each layer is
    only one of these."""
    is_apart = "mlp" in kinds or "moe" in kinds
    num_blocks = kinds.count("mlp") + kinds.count("moe") if is_apart else len(kinds)
    experts = _experts(text, num_blocks)
    if is_apart and experts:
        experts["num_expert_layers"] = kinds.count("moe")
    return {**experts, "num_dense_layers": num_blocks - experts.get("num_expert_layers", 0)}


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
