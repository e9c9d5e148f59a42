"""Heads on ranks that do not divide them: every layout up to a size, and the orders in which modes arrange them."""

import itertools

import pytest
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.head_layout import divide_heads, head_layout
from ulysses_infer.parallel.layout import Layout, Mode, Span, divisors, even_span, heads_fit, key_value_span
from ulysses_infer.parallel.sharding import Part


def given(*strategies):
    """Hypothesis' `given` with fewer examples: these tests are many, and their strategies overlap."""
    return lambda test: settings(max_examples=25)(given_any(*strategies)(test))


layouts = st.builds(
    Layout,
    st.builds(Mode, st.integers(1, 8), st.integers(1, 4)),
    st.sampled_from(["sp_inner", "tp_inner"]),
)


@st.composite
def cases(draw):
    """A layout, and any numbers of query and KV heads on it."""
    layout, key_value_heads = draw(layouts), draw(st.integers(1, 20))
    return layout, head_layout(layout.world_size, key_value_heads * draw(st.integers(1, 12)), key_value_heads)


@st.composite
def places(draw):
    """Heads on a layout, one of its modes and a shard."""
    layout, heads = draw(cases())
    mode = draw(st.sampled_from(layout.modes))
    return layout, heads, layout.place(mode, draw(st.integers(0, layout.world_size - 1)))


def members(span):
    return list(range(span.start, span.stop))


def order_of(indices, count):
    return list(range(count)) if indices is None else list(indices)


class TestShards:
    @given(cases())
    def test_every_query_head_is_owned_once_and_in_order(self, case):
        _, heads = case
        owned = [head for shard in heads.shards for slot in shard.slots for head in members(slot.query_heads)]
        assert owned == list(range(heads.num_attention_heads))
        assert owned == [head for shard in heads.shards for head in members(shard.own)]

    @given(cases())
    def test_padding_stays_within_a_query_group(self, case):
        """The query heads of a slot all read its KV head, which the shard computes."""
        _, heads = case
        group = heads.num_attention_heads // heads.num_key_value_heads
        for shard in heads.shards:
            for slot in shard.slots:
                assert {head // group for head in members(slot.query_heads)} <= {slot.key_value_head}
                assert slot.key_value_head in members(shard.key_value_heads)

    @given(cases())
    def test_all_shards_have_room_for_the_same_heads(self, case):
        _, heads = case
        assert {len(shard.slots) for shard in heads.shards} == {heads.key_value_slots}
        assert max(slot.query_heads.size for shard in heads.shards for slot in shard.slots) == heads.group_slots

    @given(cases())
    def test_a_shard_caches_no_key_value_head_that_its_own_query_heads_do_not_read(self, case):
        _, heads = case
        group = heads.num_attention_heads // heads.num_key_value_heads
        for shard in heads.shards:
            read = {head // group for head in members(shard.own)}
            assert set(members(shard.key_value_heads)) == read or not read
            assert shard.key_value_heads.size >= 1
            assert shard.query_heads.size == max(1, shard.own.size)

    @given(st.integers(1, 32), st.integers(1, 20), st.integers(1, 12))
    def test_no_layout_has_less_padding(self, world_size, key_value_heads, group):
        """Fewer KV heads would not be all of them; with fewer query heads in each slot, the slots would not do."""
        heads = head_layout(world_size, key_value_heads * group, key_value_heads)
        assert heads.key_value_slots == ceil_div(key_value_heads, world_size)
        slots = world_size * heads.key_value_slots
        assert key_value_heads * ceil_div(group, heads.group_slots) <= slots
        if heads.group_slots > 1:
            assert key_value_heads * ceil_div(group, heads.group_slots - 1) > slots

    @given(cases())
    def test_heads_are_padded_only_if_they_do_not_divide(self, case):
        layout, heads = case
        fit = heads_fit(layout.world_size, heads.num_attention_heads, heads.num_key_value_heads)
        assert heads.is_padded == (not fit)
        assert (layout.world_size * heads.query_slots == heads.num_attention_heads) or not fit

    @given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 6), st.data())
    def test_heads_that_divide_lie_where_equal_division_puts_them(self, world_size, times, group, data):
        key_value_heads = data.draw(st.sampled_from([*divisors(world_size), times * world_size]))
        query_heads = max(world_size, key_value_heads) * group
        heads = head_layout(world_size, query_heads, key_value_heads)
        for index in range(world_size):
            assert heads.query_span(index, world_size) == even_span(query_heads, index, world_size)
            assert heads.key_value_span(index, world_size) == key_value_span(key_value_heads, index, world_size)

    @given(st.integers(1, 32), st.integers(1, 80), st.booleans())
    def test_shares_of_query_heads_are_equal_where_that_costs_no_room(self, world_size, query_heads, is_shared):
        heads = head_layout(world_size, query_heads, 1 if is_shared else query_heads)
        sizes = {shard.own.size for shard in heads.shards}
        assert max(sizes) - min(sizes) <= 1


class TestModes:
    @given(places())
    def test_the_heads_of_every_mode_lie_in_the_base_slice(self, case):
        layout, heads, place = case
        base = layout.place(layout.base, place.shard)
        for span in (heads.query_span, heads.key_value_span):
            held, read = span(base.weight_index, base.mode.tp), span(place.weight_index, place.mode.tp)
            assert held.start <= read.start < read.stop <= held.stop

    @given(places())
    def test_own_heads_of_all_slices_are_all_heads_once(self, case):
        _, heads, place = case
        slices = range(place.mode.tp)
        own = [heads.own_query_span(index, place.mode.tp) for index in slices]
        assert [head for span in own for head in members(span)] == list(range(heads.num_attention_heads))
        own = [heads.own_key_value_span(index, place.mode.tp) for index in slices]
        assert [head for span in own for head in members(span)] == list(range(heads.num_key_value_heads))

    @given(places())
    def test_every_shard_gets_its_own_heads_in_every_mode(self, case):
        """The queries and KV heads that a mode's exchange gives a shard are those of its slots."""
        _, heads, place = case
        arranged = heads.arrangement(place)
        computed = heads.query_span(place.weight_index, place.mode.tp)
        cached = heads.key_value_span(place.weight_index, place.mode.tp)
        queries = [computed.start + head for head in order_of(arranged.queries, computed.size)]
        keys = [cached.start + head for head in order_of(arranged.key_values, cached.size)]
        first, shards = place.weight_index * place.mode.sp, place.mode.sp
        room = len(queries) // shards // heads.key_value_slots
        assert place.mode.sp == 1 or room == heads.group_slots
        slots = [slot for shard in heads.shards[first : first + shards] for slot in shard.slots]
        assert keys == [slot.key_value_head for slot in slots]
        for index, slot in enumerate(slots):
            given_heads = queries[index * room : (index + 1) * room]
            assert given_heads[: slot.query_heads.size] == members(slot.query_heads)
        each = room * heads.key_value_slots
        assert list(arranged.per_shard) == queries[place.token_index * each : (place.token_index + 1) * each]

    @given(places())
    def test_the_cache_of_a_rank_is_the_same_in_every_mode(self, case):
        layout, heads, place = case
        own = [slot.key_value_head for slot in heads.shards[place.shard].slots]
        for mode in layout.modes:
            at = layout.place(mode, place.shard)
            cached = heads.key_value_span(at.weight_index, mode.tp)
            order = order_of(heads.arrangement(at).key_values, cached.size)
            first = at.token_index * heads.key_value_slots
            assert [cached.start + head for head in order[first : first + heads.key_value_slots]] == own

    @given(places())
    def test_outputs_of_own_heads_come_back_and_others_count_elsewhere(self, case):
        _, heads, place = case
        arranged = heads.arrangement(place)
        computed = heads.query_span(place.weight_index, place.mode.tp)
        own = heads.own_query_span(place.weight_index, place.mode.tp)
        queries = order_of(arranged.queries, computed.size)
        returned = [computed.start + queries[place_] for place_ in order_of(arranged.returned, len(queries))]
        assert returned == members(own)
        before, after = arranged.borrowed
        assert (before + own.size + after, computed.start + before) == (computed.size, own.start)

    @given(places())
    def test_latents_have_the_same_query_heads_in_every_mode(self, case):
        _, heads, place = case
        shared = heads.with_shared_key()
        index, count = place.weight_index, place.mode.tp
        assert shared.query_span(index, count) == heads.query_span(index, count)
        assert shared.key_value_slots == 1
        assert shared.key_value_span(index, count) == Span(0, 1)
        arranged = shared.arrangement(place)
        own, room = shared.shards[place.shard].own, len(arranged.per_shard)
        assert list(arranged.per_shard[: own.size]) == members(own)
        assert place.mode.sp > 1 or (room == max(1, own.size) and arranged.queries is None)

    def test_a_slice_of_features_follows_its_heads(self):
        heads = head_layout(2, 9, 3)
        query, key = Part(9, 4, heads=heads), Part(3, 4, shared=True, heads=heads)
        assert [query.span(index, 2) for index in range(2)] == [Span(0, 16), Span(16, 36)]
        assert [key.span(index, 2) for index in range(2)] == [Span(0, 8), Span(4, 12)]
        assert [key.own_span(index, 2) for index in range(2)] == [Span(0, 8), Span(8, 12)]

    @given(places(), st.integers(1, 3))
    def test_features_of_own_spans_count_once(self, case, width):
        _, heads, place = case
        parts = Part(heads.num_attention_heads, width, heads=heads), Part(12, width, shared=True), Part(7, width)
        for part in parts:
            own = [part.own_span(index, place.mode.tp) for index in range(place.mode.tp)]
            assert [feature for span in own for feature in members(span)] == list(range(part.features))


@pytest.mark.parametrize(
    ("world_size", "query_heads", "key_value_heads", "per_rank"),
    [
        (8, 28, 4, (4, 1)),
        (2, 9, 3, (6, 2)),
        (4, 14, 2, (4, 1)),
        (8, 71, 1, (9, 1)),
        (6, 64, 8, (16, 2)),
        (8, 4, 4, (1, 1)),
    ],
)
def test_heads_of_known_models(world_size, query_heads, key_value_heads, per_rank):
    heads = head_layout(world_size, query_heads, key_value_heads)
    assert (heads.query_slots, heads.key_value_slots) == per_rank


def test_the_cost_of_padding_is_one_line():
    assert head_layout(2, 9, 3).cost_of_padding(Mode(1, 2)) == (
        "9 query and 3 KV heads are padded to 6 and 2 on each of 2 ranks, which costs +33% of attention's time, "
        "+33% of the KV cache, +33% of the all-to-all and +8% of attention's weights"
    )
    assert "+14% of attention's time, +0% of the KV cache" in head_layout(8, 28, 4).cost_of_padding(Mode(8, 1))


def test_heads_are_divided_as_the_layout_allows():
    assert divide_heads(Layout(Mode(8, 1)), 28, 4) == head_layout(8, 28, 4)
    with pytest.raises(ConfigError, match=r"use sp \* tp = 1, 2, 4 or 28, or parallel\.pad_heads=auto"):
        divide_heads(Layout(Mode(8, 1), pads_heads=False), 28, 4)


def test_a_place_that_is_padding_repeats_a_head_that_the_rank_computes():
    for world_size, group, key_value_heads in itertools.product((2, 3, 4, 6, 8), (1, 3, 7), (1, 2, 3, 5)):
        heads = head_layout(world_size, group * key_value_heads, key_value_heads)
        layout = Layout(Mode(world_size, 1))
        for mode, shard in itertools.product(layout.modes, range(world_size)):
            place = layout.place(mode, shard)
            size = heads.query_span(place.weight_index, mode.tp).size
            assert set(order_of(heads.arrangement(place).queries, size)) <= set(range(size))
