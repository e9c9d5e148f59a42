"""Which attention heads every head shard has, for any number of heads on any number of ranks. Pure functions.

Where heads do not divide over the ranks, shards are padded to equal numbers of heads within each query group.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.parallel.layout import Layout, Mode, Place, Span, check_heads, even_span, heads_fit


class HeadSlot(NamedTuple):
    """Room for one KV head in a shard and for some of the query heads that read it."""

    key_value_head: int
    query_heads: Span
    """At most as many as the layout has room for; the rest of the slot is padding."""


@dataclass(frozen=True)
class ShardHeads:
    """The heads of one shard."""

    slots: tuple[HeadSlot, ...]
    own: Span
    """Its query heads: those of all slots. No other shard has them."""
    query_heads: Span
    """The query heads that it computes: its own; or, if it has none, one of a neighbour, whose output is discarded."""
    key_value_heads: Span
    """The KV heads that it computes and caches. Neighbours may have the same ones."""


class Arrangement(NamedTuple):
    """The order in which a mode gives the heads of a weight slice to attention, and takes its outputs back.

    Heads are counted from the first one of the slice. None: each once, in order.
    """

    queries: tuple[int, ...] | None
    """The query head at each place. Places that are padding repeat one, and their output is discarded."""
    key_values: tuple[int, ...] | None
    """The KV head of each slot."""
    returned: tuple[int, ...] | None
    """The place of each own query head."""
    borrowed: tuple[int, int]
    """Query heads before and after the own ones, whose output is zero here because another slice has it."""
    per_shard: tuple[int, ...]
    """The query head, of the whole layer, at each place of this shard."""
    cached: tuple[int, ...]
    """The KV head, of the whole layer, in each slot of this shard."""


@dataclass(frozen=True)
class HeadLayout:
    """Which heads every shard has, for any number of heads on any number of ranks.

    A shard has the same number of slots as any other, each with room for `group_slots` query heads, so that all ranks
    exchange messages of the same sizes and attention sees query groups of one size. What is left over is padding: it
    exists between the exchanges only, not in weights. Shards have consecutive heads, so that every mode's share of a
    weight is contiguous.
    """

    num_attention_heads: int
    num_key_value_heads: int
    group_slots: int
    shards: tuple[ShardHeads, ...] = field(repr=False)

    @property
    def world_size(self) -> int:
        """Number of shards."""
        return len(self.shards)

    @property
    def key_value_slots(self) -> int:
        """KV heads that a rank caches, in every mode."""
        return len(self.shards[0].slots)

    @property
    def query_slots(self) -> int:
        """Query heads that a shard has room for."""
        return self.key_value_slots * self.group_slots

    @property
    def is_padded(self) -> bool:
        """Whether some slots of some shard are padding."""
        return not heads_fit(self.world_size, self.num_attention_heads, self.num_key_value_heads)

    def query_span(self, index: int, count: int) -> Span:
        """Query heads that weight slice `index` of `count` computes."""
        first, last = self._ends(index, count)
        return Span(first.query_heads.start, last.query_heads.stop)

    def own_query_span(self, index: int, count: int) -> Span:
        """Those of `query_span` that no other slice has."""
        first, last = self._ends(index, count)
        return Span(first.own.start, last.own.stop)

    def key_value_span(self, index: int, count: int) -> Span:
        """KV heads that weight slice `index` of `count` computes."""
        first, last = self._ends(index, count)
        return Span(first.key_value_heads.start, last.key_value_heads.stop)

    def own_key_value_span(self, index: int, count: int) -> Span:
        """Those of `key_value_span` that no earlier slice has."""
        span = self.key_value_span(index, count)
        return span if index == 0 else Span(max(span.start, self.key_value_span(index - 1, count).stop), span.stop)

    def _ends(self, index: int, count: int) -> tuple[ShardHeads, ShardHeads]:
        each = self.world_size // count
        return self.shards[index * each], self.shards[(index + 1) * each - 1]

    def arrangement(self, place: Place) -> Arrangement:
        """How the mode of `place` arranges the heads of its weight slice.

        Without sequence parallelism there is no exchange, and a slot is only as large as the shard itself needs.
        """
        sp, index, count = place.mode.sp, place.weight_index, place.mode.tp
        shards = self.shards[index * sp : (index + 1) * sp]
        sizes = [slot.query_heads.size for slot in shards[0].slots]
        room = self.group_slots if sp > 1 else max(1, *sizes)
        computed, own = self.query_span(index, count), self.own_query_span(index, count)
        cached = self.key_value_span(index, count)
        places = [head for shard in shards for slot in shard.slots for head in _padded(slot.query_heads, room)]
        known = [computed.start if head is None else head for head in places]
        place_of = {head: index for index, head in enumerate(places)}
        each, token_index = len(places) // sp, place.token_index
        return Arrangement(
            queries=_unless_in_order([head - computed.start for head in known], computed.size),
            key_values=_unless_in_order(
                [slot.key_value_head - cached.start for shard in shards for slot in shard.slots], cached.size
            ),
            returned=_unless_in_order([place_of[head] for head in range(*own)], len(places)),
            borrowed=(own.start - computed.start, computed.stop - own.stop),
            per_shard=tuple(known[token_index * each : (token_index + 1) * each]),
            cached=tuple(slot.key_value_head for slot in shards[token_index].slots),
        )

    def with_shared_key(self) -> HeadLayout:
        """The same query heads, all reading one KV head (an MLA latent)."""
        shards = [replace(shard, slots=(HeadSlot(0, shard.own),), key_value_heads=Span(0, 1)) for shard in self.shards]
        room = max(shard.own.size for shard in self.shards)
        return replace(self, num_key_value_heads=1, group_slots=room, shards=tuple(shards))

    def cost_of_padding(self, base: Mode) -> str:
        """What padding costs, in one line; `base`: the mode that weights are loaded for.

        Compared with heads that divide. Those, too, have copies of KV heads if there are fewer than ranks.
        """
        world_size, queries, keys = self.world_size, self.num_attention_heads, self.num_key_value_heads
        places, slots = world_size * self.query_slots, world_size * self.key_value_slots
        stored = sum(
            self.query_span(index, base.tp).size + self.key_value_span(index, base.tp).size for index in range(base.tp)
        )
        return (
            f"{queries} query and {keys} KV heads are padded to {self.query_slots} and {self.key_value_slots} on each "
            f"of {world_size} ranks, which costs {_excess(places, queries)} of attention's time, "
            f"{_excess(slots, max(keys, world_size))} of the KV cache, "
            f"{_excess(places + slots, queries + max(keys, world_size))} of the all-to-all and "
            f"{_excess(stored, queries + max(keys, base.tp))} of attention's weights"
        )


@functools.cache
def head_layout(world_size: int, num_attention_heads: int, num_key_value_heads: int) -> HeadLayout:
    """The layout with the fewest KV heads per rank and, among those, the fewest padded query heads.

    The cache comes first because it limits how many tokens fit. Shards get equal numbers of query heads if that needs
    no more room than filling equal slots.
    """
    arguments = world_size, num_attention_heads, num_key_value_heads
    slots = min((_equal_shares(*arguments), _equal_slots(*arguments)), key=_room_needed)
    count, room = _room_needed(slots)
    shards = tuple(_shard_heads(each, count) for each in slots)
    return HeadLayout(num_attention_heads, num_key_value_heads, room, shards)


def _room_needed(shards: list[list[HeadSlot]]) -> tuple[int, int]:
    """KV heads per shard, and query heads per KV head."""
    return max(map(len, shards)), max(slot.query_heads.size for slots in shards for slot in slots)


def _equal_shares(world_size: int, num_attention_heads: int, num_key_value_heads: int) -> list[list[HeadSlot]]:
    """The slots of each shard if numbers of query heads differ by at most one: one per KV head that they read."""
    group, shards = num_attention_heads // num_key_value_heads, []
    for index in range(world_size):
        own = even_span(num_attention_heads, index, world_size)
        read = range(own.start // group, ceil_div(max(own.stop, own.start + 1), group))
        parts = [Span(max(own.start, head * group), min(own.stop, (head + 1) * group)) for head in read]
        shards.append([HeadSlot(head, part) for head, part in zip(read, parts, strict=True)])
    return shards


def _equal_slots(world_size: int, num_attention_heads: int, num_key_value_heads: int) -> list[list[HeadSlot]]:
    """The slots of each shard if it has as few as possible and all slots are about equally full.

    Of all slots, KV head j has those between the rounded multiples j and j + 1 of slots per KV head; they divide its
    query heads.
    """
    each = ceil_div(num_key_value_heads, world_size)
    group, count, doubled = num_attention_heads // num_key_value_heads, world_size * each, 2 * num_key_value_heads
    ends = [(2 * head * count + num_key_value_heads) // doubled for head in range(num_key_value_heads + 1)]
    slots = []
    for head in range(num_key_value_heads):
        copies = ends[head + 1] - ends[head]
        for copy in range(copies):
            span = even_span(group, copy, copies)
            slots.append(HeadSlot(head, Span(head * group + span.start, head * group + span.stop)))
    return [slots[first : first + each] for first in range(0, count, each)]


def _shard_heads(slots: list[HeadSlot], count: int) -> ShardHeads:
    """A shard with `count` slots. Those without query heads get a KV head that the shard has anyway."""
    own = Span(slots[0].query_heads.start, slots[-1].query_heads.stop)
    read = [slot.key_value_head for slot in slots if slot.query_heads.size] or [slots[0].key_value_head]
    kept = [slot._replace(key_value_head=min(max(slot.key_value_head, read[0]), read[-1])) for slot in slots]
    kept += [HeadSlot(read[-1], Span(own.stop, own.stop))] * (count - len(slots))
    computed = own if own.size else Span(own.start, own.start + 1)
    return ShardHeads(tuple(kept), own, computed, Span(read[0], read[-1] + 1))


def _padded(heads: Span, room: int) -> list[int | None]:
    """`heads`, then None for each place that is padding."""
    return [*range(*heads), *[None] * (room - heads.size)]


def _unless_in_order(order: list[int], count: int) -> tuple[int, ...] | None:
    """`order`; None if it is that of all `count` heads."""
    return None if order == list(range(count)) else tuple(order)


def _excess(number: int, needed: int) -> str:
    return f"{100 * (number - needed) / needed:+.0f}%"


def divide_heads(layout: Layout, num_attention_heads: int, num_key_value_heads: int) -> HeadLayout:
    """The heads of every shard. Raises `ConfigError` if they do not divide and the layout does not pad."""
    check_heads(layout, num_attention_heads, num_key_value_heads)
    return head_layout(layout.world_size, num_attention_heads, num_key_value_heads)
