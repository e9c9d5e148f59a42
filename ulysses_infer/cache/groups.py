"""Cache groups: layers with the same attention span share a block table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ulysses_infer.attention.span import AttentionSpan

if TYPE_CHECKING:
    from ulysses_infer.attention.backend import AttentionOptions

T = TypeVar("T")


@dataclass(frozen=True)
class LayerGroups:
    """A model's layers sorted into cache groups, the one that sees furthest first.

    Every group has blocks and, for each sequence, a block table of its own: one pool a group, so that a block is of
    one size and a table is read by all its layers alike, whatever the numbers of layers are.
    """

    attention_spans: tuple[AttentionSpan, ...]
    of_layer: tuple[int, ...]
    """The group of each layer."""

    @classmethod
    def single(cls, num_layers: int, attention_span: AttentionSpan | None = None) -> LayerGroups:
        """All layers alike."""
        return cls((attention_span or AttentionSpan(),), (0,) * num_layers)

    @classmethod
    def of(cls, options: Iterable[AttentionOptions], max_model_len: int) -> LayerGroups:
        """By how each layer attends, in the order of layers, in texts of up to `max_model_len` tokens."""
        layers = [AttentionSpan(o.sliding_window, o.chunk_size).within(max_model_len) for o in options]
        attention_spans = sorted(
            dict.fromkeys(layers), key=lambda attention_span: attention_span.length or max_model_len, reverse=True
        )
        return cls(tuple(attention_spans), tuple(attention_spans.index(attention_span) for attention_span in layers))

    def each_layer(self, of_groups: Sequence[T]) -> list[T] | None:
        """What `of_groups` has for the group of each layer; None where all layers are of one."""
        return [of_groups[group] for group in self.of_layer] if len(of_groups) > 1 else None

    def num_layers(self, group: int) -> int:
        """Layers of a group."""
        return self.of_layer.count(group)
