"""The arithmetic of head shards, modes and token slices, for any layout."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import (
    Layout,
    Mode,
    Span,
    check_heads,
    check_mode,
    divisors,
    even_span,
    heads_fit,
    key_value_span,
    token_spans,
)

layouts = st.builds(
    Layout,
    st.builds(Mode, st.integers(1, 12), st.integers(1, 6)),
    st.sampled_from(["sp_inner", "tp_inner"]),
)


@st.composite
def layouts_with_mode(draw):
    """A layout and one of its modes."""
    layout = draw(layouts)
    return layout, draw(st.sampled_from(layout.modes))


@st.composite
def layouts_with_heads(draw):
    """A layout with (query heads, key/value heads) that divide over it, shared and replicated ones alike."""
    layout = draw(layouts)
    world_size = layout.world_size
    key_value_heads = draw(st.sampled_from(divisors(world_size)) | st.integers(1, 4).map(lambda k: k * world_size))
    group = draw(st.integers(1, 6))
    unit = max(world_size, key_value_heads)
    return layout, unit * group, key_value_heads


def members(span):
    return list(range(span.start, span.stop))


def contains(outer, inner):
    return outer.start <= inner.start <= inner.stop <= outer.stop


class TestEvenSpans:
    @given(total=st.integers(0, 10_000), parts=st.integers(1, 64))
    def test_every_row_is_owned_once_and_in_order(self, total, parts):
        spans = [even_span(total, index, parts) for index in range(parts)]
        assert [row for span in spans for row in members(span)] == list(range(total))

    @given(total=st.integers(0, 10_000), parts=st.integers(1, 64))
    def test_sizes_differ_by_at_most_one(self, total, parts):
        sizes = [even_span(total, index, parts).size for index in range(parts)]
        assert max(sizes) - min(sizes) <= 1

    @given(num_tokens=st.integers(1, 5000), sp=st.integers(1, 16))
    def test_token_slices_partition_any_batch(self, num_tokens, sp):
        spans = token_spans(num_tokens, sp)
        assert len(spans) == sp
        assert [token for span in spans for token in members(span)] == list(range(num_tokens))
        assert max(span.size for span in spans) == -(-num_tokens // sp)

    def test_one_token_on_eight_ranks_is_one_rank_s_work(self):
        assert sorted(span.size for span in token_spans(1, 8)) == [0] * 7 + [1]

    @given(layouts_with_mode(), st.integers(1, 10_000))
    def test_weight_slice_of_any_mode_lies_in_the_base_slice(self, layout_and_mode, total):
        layout, mode = layout_and_mode
        for shard in range(layout.world_size):
            base, place = layout.place(layout.base, shard), layout.place(mode, shard)
            stored = even_span(total, base.weight_index, layout.base.tp)
            read = even_span(total, place.weight_index, mode.tp)
            assert contains(stored, read)
            assert read.relative_to(stored).size == read.size

    @given(layouts_with_mode(), st.integers(1, 10_000))
    def test_own_part_lies_in_the_weight_slice_of_any_mode(self, layout_and_mode, total):
        layout, mode = layout_and_mode
        for shard in range(layout.world_size):
            read = even_span(total, layout.place(mode, shard).weight_index, mode.tp)
            assert contains(read, even_span(total, shard, layout.world_size))

    def test_relative_span_counts_from_its_outer_one(self):
        assert Span(5, 7).relative_to(Span(4, 8)) == Span(1, 3)


class TestModes:
    @given(layouts)
    def test_modes_are_all_splits_that_refine_the_base(self, layout):
        world_size, base = layout.world_size, layout.base
        expected = {
            (sp, tp)
            for sp in range(1, world_size + 1)
            for tp in range(1, world_size + 1)
            if sp * tp == world_size and tp % base.tp == 0
        }
        assert set(layout.modes) == expected
        assert (layout.modes[0], layout.modes[-1]) == (base, layout.shift)

    @given(layouts, st.builds(Mode, st.integers(1, 16), st.integers(1, 16)))
    def test_only_these_modes_pass_the_check(self, layout, mode):
        if mode in layout.modes:
            check_mode(layout, mode)
            return
        with pytest.raises(ConfigError, match=re.escape(f"mode [{mode.sp}, {mode.tp}] cannot run")) as caught:
            check_mode(layout, mode)
        for sp, tp in layout.modes:
            assert f"[{sp}, {tp}]" in str(caught.value)

    def test_mode_prints_as_its_two_numbers(self):
        assert str(Mode(4, 2)) == "sp4xtp2"


class TestGroups:
    @given(layouts)
    def test_rank_and_shard_are_inverses(self, layout):
        ranks = range(layout.world_size)
        assert [layout.rank_of(layout.shard_of(rank)) for rank in ranks] == list(ranks)
        assert sorted(layout.shard_of(rank) for rank in ranks) == list(ranks)

    def test_sp_inner_shard_is_the_rank(self):
        layout = Layout(Mode(3, 2))
        assert [layout.shard_of(rank) for rank in range(6)] == [0, 1, 2, 3, 4, 5]

    def test_tp_inner_shards_are_those_of_the_paper(self):
        layout = Layout(Mode(3, 2), "tp_inner")
        assert [layout.shard_of(rank) for rank in range(6)] == [0, 3, 1, 4, 2, 5]

    def test_tp_inner_base_tensor_groups_are_neighbours(self):
        layout = Layout(Mode(3, 2), "tp_inner")
        groups = {tuple(layout.tp_group(layout.base, layout.shard_of(rank))) for rank in range(6)}
        assert groups == {(0, 1), (2, 3), (4, 5)}

    @given(layouts_with_mode())
    def test_groups_of_each_kind_partition_the_world(self, layout_and_mode):
        layout, mode = layout_and_mode
        shards = range(layout.world_size)
        for groups, size in (
            ({tuple(layout.sp_group(mode, shard)) for shard in shards}, mode.sp),
            ({tuple(layout.tp_group(mode, shard)) for shard in shards}, mode.tp),
        ):
            assert sorted(rank for group in groups for rank in group) == list(shards)
            assert {len(group) for group in groups} == {size}

    @given(layouts_with_mode())
    def test_two_groups_of_a_shard_meet_in_its_own_rank(self, layout_and_mode):
        layout, mode = layout_and_mode
        for shard in range(layout.world_size):
            sp_group, tp_group = layout.sp_group(mode, shard), layout.tp_group(mode, shard)
            assert set(sp_group) & set(tp_group) == {layout.rank_of(shard)}

    @given(layouts_with_mode())
    def test_position_in_a_group_is_the_slice_index(self, layout_and_mode):
        layout, mode = layout_and_mode
        for shard in range(layout.world_size):
            place, rank = layout.place(mode, shard), layout.rank_of(shard)
            assert layout.sp_group(mode, shard).index(rank) == place.token_index
            assert layout.tp_group(mode, shard).index(rank) == place.weight_index

    @given(layouts_with_mode())
    def test_weight_and_token_slices_tile_the_work_of_a_step(self, layout_and_mode):
        layout, mode = layout_and_mode
        places = [layout.place(mode, shard) for shard in range(layout.world_size)]
        cells = [(place.token_index, place.weight_index) for place in places]
        assert sorted(cells) == [(sp, tp) for sp in range(mode.sp) for tp in range(mode.tp)]

    @given(layouts_with_mode())
    def test_sp_group_shares_weights_and_tp_group_shares_tokens(self, layout_and_mode):
        layout, mode = layout_and_mode
        for shard in range(layout.world_size):
            place = layout.place(mode, shard)
            partners = [layout.place(mode, layout.shard_of(rank)) for rank in layout.sp_group(mode, shard)]
            assert {partner.weight_index for partner in partners} == {place.weight_index}
            partners = [layout.place(mode, layout.shard_of(rank)) for rank in layout.tp_group(mode, shard)]
            assert {partner.token_index for partner in partners} == {place.token_index}


class TestHeads:
    @given(layouts_with_heads())
    def test_every_query_head_is_owned_once(self, case):
        layout, query_heads, _ = case
        spans = [even_span(query_heads, shard, layout.world_size) for shard in range(layout.world_size)]
        assert [head for span in spans for head in members(span)] == list(range(query_heads))
        assert len({span.size for span in spans}) == 1

    @given(layouts_with_heads())
    def test_key_value_heads_of_a_shard_start_at_its_share(self, case):
        layout, _, key_value_heads = case
        world_size = layout.world_size
        for shard in range(world_size):
            span = key_value_span(key_value_heads, shard, world_size)
            assert span.start == shard * key_value_heads // world_size
            assert span.size == max(1, key_value_heads // world_size)

    @given(layouts_with_heads())
    def test_shard_owns_the_key_value_heads_its_query_heads_read(self, case):
        layout, query_heads, key_value_heads = case
        for shard in range(layout.world_size):
            read = {
                head * key_value_heads // query_heads
                for head in members(even_span(query_heads, shard, layout.world_size))
            }
            assert read == set(members(key_value_span(key_value_heads, shard, layout.world_size)))

    @given(layouts_with_heads())
    def test_cache_of_a_rank_is_the_same_in_every_mode(self, case):
        """The heads that the all-to-all of a mode can give a shard cover the cache that the shard always owns."""
        layout, _, key_value_heads = case
        for mode in layout.modes:
            for shard in range(layout.world_size):
                computed = key_value_span(key_value_heads, layout.place(mode, shard).weight_index, mode.tp)
                group = [layout.shard_of(rank) for rank in layout.sp_group(mode, shard)]
                owned = [key_value_span(key_value_heads, member, layout.world_size) for member in group]
                assert {head for span in owned for head in members(span)} == set(members(computed))

    @given(layouts_with_heads())
    def test_fitting_heads_pass_the_check(self, case):
        layout, *heads = case
        check_heads(replace(layout, pads_heads=False), *heads)

    @given(layouts, st.integers(1, 64), st.integers(1, 16))
    def test_no_heads_are_refused_if_they_are_padded(self, layout, group, key_value_heads):
        check_heads(layout, group * key_value_heads, key_value_heads)

    def test_query_heads_that_cannot_share_key_value_heads_evenly_are_refused(self):
        with pytest.raises(ConfigError, match="10 query heads cannot share 4 key/value heads evenly"):
            check_heads(Layout(Mode(2, 1)), 10, 4)

    @given(layouts, st.integers(1, 64), st.integers(1, 16))
    def test_refusal_lists_the_layouts_that_work_and_no_other(self, layout, group, key_value_heads):
        query_heads = group * key_value_heads
        if heads_fit(layout.world_size, query_heads, key_value_heads):
            return
        with pytest.raises(ConfigError) as caught:
            check_heads(replace(layout, pads_heads=False), query_heads, key_value_heads)
        message = str(caught.value)
        listed = [int(number) for number in re.findall(r"\d+", message.partition("; use sp * tp = ")[2])]
        working = [size for size in range(1, query_heads + 1) if heads_fit(size, query_heads, key_value_heads)]
        assert listed == working
        for size in listed:
            check_heads(Layout(Mode(size, 1), pads_heads=False), query_heads, key_value_heads)

    def test_refusal_reads_as_one_sentence(self):
        with pytest.raises(ConfigError) as caught:
            check_heads(Layout(Mode(8, 1), pads_heads=False), 12, 4)
        assert str(caught.value) == (
            "12 query heads and 4 key/value heads do not divide over sp * tp = 8 ranks; use sp * tp = 1, 2, 4 or 12, "
            "or parallel.pad_heads=auto"
        )

    @pytest.mark.parametrize(
        ("world_size", "query_heads", "key_value_heads", "fit"),
        [
            (8, 64, 8, True),
            (8, 32, 4, True),
            (8, 40, 8, True),
            (8, 20, 4, False),
            (6, 24, 4, False),
            (3, 12, 4, False),
        ],
    )
    def test_heads_fit_when_shards_are_equal_and_read_whole_heads(self, world_size, query_heads, key_value_heads, fit):
        assert heads_fit(world_size, query_heads, key_value_heads) is fit
