"""The bounds that no engine can beat: weights read at memory bandwidth, products at the processors' peak rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.compare_peers.work import Work


@dataclass(frozen=True)
class Sizes:
    """A dense Llama's sizes, in elements."""

    layers: int
    layer_weights: int
    """Of the matrices of one layer."""
    head_weights: int
    key_value_width: int
    """Of keys and values of one token and layer concurrent."""
    query_width: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """From a checkpoint's `config.json`."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        query, key_value = heads * head_dim, 2 * config["num_key_value_heads"] * head_dim
        matrices = hidden * (2 * query + key_value) + 3 * hidden * config["intermediate_size"]
        return cls(config["num_hidden_layers"], matrices, hidden * config["vocab_size"], key_value, query)

    @property
    def weights(self) -> int:
        """Read in every step: all matrices but the embedding, which a step reads by rows."""
        return self.layers * self.layer_weights + self.head_weights

    def prefill_operations(self, tokens: int) -> float:
        """Multiplications and additions for one prompt, logits for its last token only."""
        attention = 4 * self.query_width * tokens * (tokens + 1) / 2
        return self.layers * (2 * self.layer_weights * tokens + attention) + 2 * self.head_weights

    def decode_operations(self, context: float) -> float:
        """Multiplications and additions for one more token after `context` others."""
        return 2 * self.weights + self.layers * 4 * self.query_width * context

    def decode_bytes(self, sequences: int, context: float, bits: int) -> float:
        """Weights of `bits` each, and keys and values of all sequences in 16 bits."""
        return bits / 8 * self.weights + 2 * sequences * context * self.layers * self.key_value_width


@dataclass(frozen=True)
class Floors:
    """The shortest times that a machine allows, and the highest throughput."""

    ttft: float
    tpot: float
    throughput: float

    def including(self, ttft: float, tpot: float, throughput: float) -> Floors:
        """The same, but never worse than what an engine reached: then the machine allows at least that."""
        return Floors(min(self.ttft, ttft), min(self.tpot, tpot), max(self.throughput, throughput))


def floors(sizes: Sizes, single: Work, concurrent: Work, bandwidth: float, matmul: float, bits: int = 16) -> Floors:
    """bandwidth: bytes per second; matmul: operations per second; bits: of a weight, without scales.

    A step takes the longer of the two times.
    """

    def prefill(work: Work) -> float:
        operations = work.num_prompts * sizes.prefill_operations(work.input_len)
        return max(operations / matmul, bits / 8 * sizes.weights / bandwidth)

    def decode(work: Work) -> float:
        context = work.input_len + work.output_len / 2
        return max(
            sizes.decode_bytes(work.num_prompts, context, bits) / bandwidth,
            work.num_prompts * sizes.decode_operations(context) / matmul,
        )

    seconds = prefill(concurrent) + (concurrent.output_len - 1) * decode(concurrent)
    return Floors(prefill(single), decode(single), concurrent.num_tokens / seconds)
