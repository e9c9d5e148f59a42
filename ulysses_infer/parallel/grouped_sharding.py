"""Division of weights whose features come in groups, each with the same parts."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.parallel.layout import Place, Span, key_value_span
from ulysses_infer.parallel.sharding import Sharding


@dataclass(frozen=True)
class GroupedSharding(Sharding):
    """A weight dimension made of equal groups, each with the same `parts` (Qwen3-Next: per key head).

    Whole groups are divided over shards. If there are fewer groups than shards, neighbouring shards divide one.
    """

    groups: int

    @property
    def features(self) -> int:
        """Number of rows (or columns) of the whole weight."""
        return self.groups * super().features

    def spans(self, index: int, count: int) -> list[Span]:
        """Features of slice `index` of `count`: one span of whole groups, or one per part of its group."""
        size = super().features
        own = key_value_span(self.groups, index, count)
        if self.groups >= count:
            return [Span(own.start * size, own.stop * size)]
        sharers = count // self.groups
        parts = super().spans(index % sharers, sharers)
        return [Span(own.start * size + part.start, own.start * size + part.stop) for part in parts]

    def part_spans(self, base: Place, place: Place) -> list[Span]:
        """Features of `place`, relative to the stored base slice."""
        found = []
        for wanted in self.spans(place.weight_index, place.mode.tp):
            offset = 0
            for stored in self.base_spans(base):
                if stored.start <= wanted.start and wanted.stop <= stored.stop:
                    inside = wanted.relative_to(stored)
                    found.append(Span(offset + inside.start, offset + inside.stop))
                    break
                offset += stored.size
        return found
