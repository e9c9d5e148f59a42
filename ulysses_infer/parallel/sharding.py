"""Division of a weight's features over shards, and the position of a mode's slice inside the base slice."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.parallel.head_layout import HeadLayout
from ulysses_infer.parallel.layout import Place, Span, even_span, key_value_span


@dataclass(frozen=True)
class Part:
    """A contiguous range of `units` equal units (heads, neurons) of `width` features each.

    `shared` marks key/value heads: if there are fewer than shards, neighbouring shards share one. `heads`: the layout
    of attention heads, for units that are heads of attention; without it, units are divided evenly.
    """

    units: int
    width: int = 1
    shared: bool = False
    heads: HeadLayout | None = None

    @property
    def features(self) -> int:
        """Number of rows (or columns) of the weight in this part."""
        return self.units * self.width

    def span(self, index: int, count: int) -> Span:
        """Features of slice `index` of `count`, counted from the start of this part."""
        return self._features(self._units(index, count))

    def own_span(self, index: int, count: int) -> Span:
        """Those features of `span` that count for slice `index`, so that over all slices each feature counts once."""
        if self.heads is not None:
            own = self.heads.own_key_value_span if self.shared else self.heads.own_query_span
            return self._features(own(index, count))
        units = self._units(index, count)
        start = units.start if index == 0 else max(units.start, self._units(index - 1, count).stop)
        return self._features(Span(start, units.stop))

    def _units(self, index: int, count: int) -> Span:
        if self.heads is not None:
            return (self.heads.key_value_span if self.shared else self.heads.query_span)(index, count)
        return (key_value_span if self.shared else even_span)(self.units, index, count)

    def _features(self, units: Span) -> Span:
        return Span(units.start * self.width, units.stop * self.width)


@dataclass(frozen=True)
class Sharding:
    """A weight dimension made of parts that are divided separately, e.g. packed q, k and v."""

    parts: tuple[Part, ...]

    @property
    def features(self) -> int:
        """Number of rows (or columns) of the whole weight."""
        return sum(part.features for part in self.parts)

    def spans(self, index: int, count: int) -> list[Span]:
        """Features of slice `index` of `count` in the whole weight, one span per part."""
        spans, offset = [], 0
        for part in self.parts:
            span = part.span(index, count)
            spans.append(Span(offset + span.start, offset + span.stop))
            offset += part.features
        return spans

    def base_spans(self, base: Place) -> list[Span]:
        """Features that a rank stores: its slice in the base mode."""
        return merge(self.spans(base.weight_index, base.mode.tp))

    def part_spans(self, base: Place, place: Place) -> list[Span]:
        """Features of each part of `place`, relative to the stored base slice."""
        found, offset = [], 0
        for part in self.parts:
            stored = part.span(base.weight_index, base.mode.tp)
            wanted = part.span(place.weight_index, place.mode.tp).relative_to(stored)
            found.append(Span(offset + wanted.start, offset + wanted.stop))
            offset += stored.size
        return found

    def local_spans(self, base: Place, place: Place) -> list[Span]:
        """`part_spans` with adjacent spans merged, so that a whole base slice is one span."""
        return merge(self.part_spans(base, place))


def merge(spans: list[Span]) -> list[Span]:
    """Merge adjacent spans, for fewer reads and fewer matrix products."""
    joined = [spans[0]]
    for span in spans[1:]:
        if span.start == joined[-1].stop:
            joined[-1] = Span(joined[-1].start, span.stop)
        else:
            joined.append(span)
    return joined
