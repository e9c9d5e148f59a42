"""Weights whose features come in groups: every slice of a mode lies in the base slice, and shards cover everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.parallel.grouped_sharding import GroupedSharding
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.parallel.sharding import Part

POWERS = st.sampled_from((1, 2, 4, 8))


@given(sp=POWERS, tp=POWERS, groups=POWERS, each=st.sampled_from((8, 16)), width=st.integers(1, 5))
def test_slices_of_groups(sp: int, tp: int, groups: int, each: int, width: int) -> None:
    """A shared key and `each` values per group, as Qwen3-Next packs them."""
    world_size = sp * tp
    sharding = GroupedSharding((Part(1, 3, shared=True), Part(each * 8, width)), groups)
    layout = Layout(Mode(sp, tp))
    covered = set()
    for shard in range(world_size):
        covered |= _features(sharding.spans(shard, world_size))
        base = layout.place(layout.base, shard)
        stored = [feature for span in sharding.base_spans(base) for feature in range(*span)]
        for mode in layout.modes:
            place = layout.place(mode, shard)
            wanted = [feature for span in sharding.spans(place.weight_index, mode.tp) for feature in range(*span)]
            found = [stored[row] for span in sharding.part_spans(base, place) for row in range(*span)]
            assert found == wanted
            assert set(wanted) >= _features(sharding.spans(shard, world_size))
    assert covered == set(range(sharding.features))


def _features(spans: list[tuple[int, int]]) -> set[int]:
    return {feature for start, stop in spans for feature in range(start, stop)}
