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

    Each cache group has its own pool of blocks, and each sequence its own block table per group. All layers of a group
    read the same table; a block takes memory in each of them, as much as the heads of that layer need.

    Not to be confused with process groups (ranks) and query groups (heads that share a KV head).
    """

    attention_spans: tuple[AttentionSpan, ...]
    of_layer: tuple[int | None, ...]
    """The cache group of each layer; None: it has no attention."""
    of_entries: tuple[int, ...] = ()
    """The cache group of each kind of entries (`CacheShape.entries`)."""

    @classmethod
    def single(cls, num_layers: int, attention_span: AttentionSpan | None = None, num_entries: int = 0) -> CacheGroups:
        """One cache group for all layers and kinds of entries."""
        return cls((attention_span or AttentionSpan(),), (0,) * num_layers, (0,) * num_entries)

    @classmethod
    def of(
        cls,
        options: Iterable[AttentionOptions | None],
        max_model_len: int,
        entry_spans: Iterable[AttentionSpan] = (),
    ) -> CacheGroups:
        """Groups layers by their attention options, in layer order, for texts of up to `max_model_len` tokens.

        None: a layer without attention. A model without any attention has one group without layers. entry_spans: how
        far back each kind of entries is read.
        """
        layers = [None if each is None else each.span.within(max_model_len) for each in options]
        entries = [span.within(max_model_len) for span in entry_spans]
        distinct = dict.fromkeys(span for span in (*layers, *entries) if span is not None) or {AttentionSpan(): None}
        spans = sorted(distinct, key=lambda span: span.length or max_model_len, reverse=True)
        of_layer = tuple(None if span is None else spans.index(span) for span in layers)
        return cls(tuple(spans), of_layer, tuple(map(spans.index, entries)))

    def each_layer(self, of_groups: Sequence[T]) -> list[T] | None:
        """The item of `of_groups` for each layer; None if there is only one group.

        A layer without attention gets the first.
        """
        return [of_groups[group or 0] for group in self.of_layer] if len(of_groups) > 1 else None

    def layers_of(self, group: int) -> list[int]:
        """The layers of a group."""
        return [layer for layer, own in enumerate(self.of_layer) if own == group]
