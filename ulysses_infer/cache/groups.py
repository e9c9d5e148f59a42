"""Cache groups: layers with the same attention span share a block table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.attention.span import AttentionSpan

T = TypeVar("T")


@dataclass(frozen=True)
class CacheGroups:
    """The cache groups of a model, longest attention span first.

    Each cache group has its own pool of blocks, and each sequence its own block table per group. So all blocks of a
    pool have the same size, and all layers of a group read the same table.

    Not to be confused with process groups (ranks) and query groups (heads that share a KV head).
    """

    attention_spans: tuple[AttentionSpan, ...]
    of_layer: tuple[int, ...]
    """The cache group of each layer."""

    @classmethod
    def single(cls, num_layers: int, attention_span: AttentionSpan | None = None) -> CacheGroups:
        """One cache group for all layers."""
        return cls((attention_span or AttentionSpan(),), (0,) * num_layers)

    @classmethod
    def of(cls, options: Iterable[AttentionOptions], max_model_len: int) -> CacheGroups:
        """Groups layers by their attention options, in layer order, for texts of up to `max_model_len` tokens."""
        layers = [o.span.within(max_model_len) for o in options]
        attention_spans = sorted(
            dict.fromkeys(layers), key=lambda attention_span: attention_span.length or max_model_len, reverse=True
        )
        return cls(tuple(attention_spans), tuple(attention_spans.index(attention_span) for attention_span in layers))

    def each_layer(self, of_groups: Sequence[T]) -> list[T] | None:
        """The item of `of_groups` for each layer; None if there is only one group."""
        return [of_groups[group] for group in self.of_layer] if len(of_groups) > 1 else None

    def num_layers(self, group: int) -> int:
        """Number of layers of a group."""
        return self.of_layer.count(group)
