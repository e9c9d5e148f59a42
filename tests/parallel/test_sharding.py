"""Where a mode's share of a weight lies, in the whole weight and in the stored base slice."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.parallel.head_layout import head_layout
from ulysses_infer.parallel.layout import Layout, Mode, Span, divisors
from ulysses_infer.parallel.sharding import Part, Sharding, merge

layouts = st.builds(
    Layout,
    st.builds(Mode, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3, 4])),
    st.sampled_from(["sp_inner", "tp_inner"]),
)


@st.composite
def shardings(draw, world_size):
    """One weight: plain, uneven, or packed query, key and value heads, which may not divide over the ranks."""
    kind = draw(st.sampled_from(["even", "uneven", "heads", "packed", "padded"]))
    if kind == "even":
        return Sharding((Part(world_size * draw(st.integers(1, 3)), draw(st.integers(1, 3))),))
    if kind == "uneven":
        parts = draw(st.integers(1, 3))
        return Sharding(tuple(Part(draw(st.integers(1, 40))) for _ in range(parts)))
    if kind == "padded":
        heads = head_layout(world_size, draw(st.integers(1, 6)) * (keys := draw(st.integers(1, 12))), keys)
        query = Part(heads.num_attention_heads, draw(st.integers(1, 3)), heads=heads)
        return Sharding((query, *[Part(keys, draw(st.integers(1, 3)), shared=True, heads=heads)] * 2))
    key_value = draw(st.sampled_from(divisors(world_size)) | st.integers(1, 3).map(lambda n: n * world_size))
    query = Part(max(world_size, key_value) * draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    shared = Part(key_value, draw(st.integers(1, 3)), shared=True)
    return Sharding((query,)) if kind == "heads" else Sharding((query, shared, shared))


@st.composite
def cases(draw):
    """A layout, one of its modes, a shard and a weight."""
    layout = draw(layouts)
    mode = draw(st.sampled_from(layout.modes))
    shard = draw(st.integers(0, layout.world_size - 1))
    return layout, mode, shard, draw(shardings(layout.world_size))


def rows(spans):
    return [row for span in spans for row in range(span.start, span.stop)]


@given(cases())
def test_slices_of_a_mode_cover_the_weight(case):
    _layout, mode, _, sharding = case
    owned = [rows(sharding.spans(index, mode.tp)) for index in range(mode.tp)]
    assert set().union(*owned) == set(range(sharding.features))
    if not any(part.shared or part.heads for part in sharding.parts):
        assert sorted(row for mine in owned for row in mine) == list(range(sharding.features))


@given(cases())
def test_the_slice_of_every_mode_lies_in_the_stored_base_slice(case):
    layout, mode, shard, sharding = case
    stored = rows(sharding.base_spans(layout.place(layout.base, shard)))
    assert set(rows(sharding.spans(layout.place(mode, shard).weight_index, mode.tp))) <= set(stored)


@given(cases())
def test_views_of_the_base_slice_are_the_slices_of_the_whole_weight(case):
    layout, mode, shard, sharding = case
    whole = torch.arange(sharding.features)
    base, place = layout.place(layout.base, shard), layout.place(mode, shard)
    stored = torch.cat([whole[slice(*span)] for span in sharding.base_spans(base)])
    viewed = [stored[slice(*span)] for span in sharding.part_spans(base, place)]
    wanted = [whole[slice(*span)] for span in sharding.spans(place.weight_index, mode.tp)]
    assert len(viewed) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(viewed, wanted, strict=True))


@given(cases())
def test_joined_views_hold_the_same_features_in_the_same_order(case):
    layout, mode, shard, sharding = case
    base, place = layout.place(layout.base, shard), layout.place(mode, shard)
    assert rows(sharding.local_spans(base, place)) == rows(sharding.part_spans(base, place))


@given(cases())
def test_the_base_mode_reads_the_whole_stored_slice_at_once(case):
    layout, _, shard, sharding = case
    base = layout.place(layout.base, shard)
    (span,) = sharding.local_spans(base, base)
    assert span == Span(0, len(rows(sharding.base_spans(base))))


@given(cases())
def test_ranks_of_a_sequence_group_read_the_same_slice(case):
    layout, mode, shard, sharding = case
    slices = {
        tuple(sharding.spans(layout.place(mode, layout.shard_of(rank)).weight_index, mode.tp))
        for rank in layout.sp_group(mode, shard)
    }
    assert len(slices) == 1


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 4))
def test_sizes_of_uneven_slices_differ_by_one_unit_at_most(units, count, width):
    sizes = [Part(units, width).span(index, count).size for index in range(count)]
    assert max(sizes) - min(sizes) <= width
    assert sum(sizes) == units * width


def test_neighbouring_shards_share_a_key_value_head_when_there_are_too_few():
    part = Part(2, width=8, shared=True)
    assert [part.span(index, 4) for index in range(4)] == [Span(0, 8), Span(0, 8), Span(8, 16), Span(8, 16)]


def test_packed_parts_are_cut_one_by_one():
    packed = Sharding((Part(4, 2), Part(2, 2, shared=True), Part(2, 2, shared=True)))
    assert packed.spans(1, 2) == [Span(4, 8), Span(10, 12), Span(14, 16)]
    assert packed.features == 16


def test_touching_spans_merge_and_others_do_not():
    assert merge([Span(0, 2), Span(2, 5), Span(6, 7)]) == [Span(0, 5), Span(6, 7)]
