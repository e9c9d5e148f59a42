"""How many blocks each cache group gets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.paged import CacheShape, LayerShape, PagedCache
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.errors import ConfigError

SHAPE = CacheShape.uniform(3, 2, key_width=8, value_width=6, block_size=4, dtype=torch.float32)
ALL = CacheGroups.single(3)
MIXED = CacheGroups((AttentionSpan(), AttentionSpan(6)), (1, 0, 1))
attention_spans = st.builds(AttentionSpan, st.none() | st.integers(1, 60), st.none() | st.integers(1, 60))


def sizing(groups=ALL, max_model_len=28, max_num_seqs=1, max_num_batched_tokens=16):
    return CacheSizing(SHAPE, groups, max_model_len, max_num_seqs, max_num_batched_tokens)


def test_layers_are_grouped_by_attention_span_longest_first():
    windows = (6, None, 6, 200, 9)
    options = [AttentionOptions(1.0, sliding_window=window) for window in windows] + [AttentionOptions(1.0, None, 8)]
    groups = CacheGroups.of(options, max_model_len=100)
    assert groups.attention_spans == (
        AttentionSpan(),
        AttentionSpan(9),
        AttentionSpan(chunk_size=8),
        AttentionSpan(6),
    ), "a window of 200 shows all of 100"
    assert groups.of_layer == (3, 0, 3, 0, 1, 2)
    assert [groups.layers_of(group) for group in range(4)] == [[1, 3], [4], [5], [0, 2]]
    assert groups.each_layer("abcd") == list("dadabc")


def test_layers_with_equal_spans_form_one_cache_group():
    for window in (None, 5):
        groups = CacheGroups.of([AttentionOptions(1.0, sliding_window=window)] * 3, max_model_len=100)
        assert groups == CacheGroups.single(3, AttentionSpan(window))
        assert groups.each_layer("a") is None


@given(attention_spans, st.integers(0, 120), st.integers(1, 30), st.integers(1, 9))
def test_a_sequence_never_holds_more_blocks_than_predicted(attention_span, start, count, block_size):
    """For any step: from the first block that its first token sees to the last that it writes."""
    held = -(-(start + count) // block_size) - attention_span.first_visible(start) // block_size
    assert held <= attention_span.most_blocks(start + count, count, block_size) <= -(-(start + count) // block_size)


def test_full_attention_layers_share_the_memory_evenly():
    assert sizing().blocks_within(20 * SHAPE.bytes_per_block + 1) == [7], "what one request of 28 tokens can fill"
    assert sizing(max_num_seqs=9).blocks_within(20 * SHAPE.bytes_per_block + 1) == [20]
    assert sizing().blocks_within(20 * SHAPE.bytes_per_block + 1, use_all=True) == [20]
    assert sizing().blocks_per_group(11) == [11]


def test_windows_get_what_running_requests_hold_and_full_attention_the_rest():
    """A decode holds up to 3 blocks of a window of 6; 2 more for its start; a step of 16 tokens takes 4."""
    plenty = 10**9
    assert sizing(MIXED, 4000, 8).blocks_within(plenty) == [8 * 1000, 8 * (3 + 2) + 4]
    assert sizing(MIXED, 4000, 8).blocks_per_group(100) == [100, 44]
    assert sizing(MIXED, 4000, 8).blocks_per_group(30) == [30, 30], "never more than with one table for all"


def test_windows_are_sized_for_fewer_requests_if_one_would_not_fit():
    crowd = sizing(MIXED, 400, 1000)
    num_bytes = crowd.num_bytes([100, 40])
    assert crowd.blocks_within(num_bytes) == [100, 5 * 7 + 4], "with windows for a thousand, the first would get 60"
    crowd.check_fits_one_request(crowd.blocks_within(num_bytes))


@given(
    st.lists(attention_spans, min_size=1, max_size=4),
    st.integers(1, 300),
    st.integers(1, 20),
    st.integers(1, 64),
    st.integers(0, 400_000),
    st.booleans(),
)
def test_the_memory_is_used_and_holds_one_request_if_possible(kinds, longest, num_seqs, step, num_bytes, use_all):
    options = [AttentionOptions(1.0, kind.sliding_window, kind.chunk_size) for kind in kinds]
    shape = CacheShape.uniform(len(kinds), 2, 8, 6, 4, torch.float32)
    made = CacheSizing(shape, CacheGroups.of(options, longest), longest, num_seqs, step)
    found, needed = made.blocks_within(num_bytes, use_all), made.blocks_of_request(longest)
    assert made.num_bytes(found) <= num_bytes
    assert all(0 <= count <= found[0] for count in found)
    fits = all(have >= want for have, want in zip(found, needed, strict=True))
    assert fits == (made.num_bytes(needed) <= num_bytes)
    even = min(num_bytes // shape.bytes_per_block, made.blocks_within(10**12)[0])
    assert found[0] >= even, "texts at least as long as with one table for all"


@pytest.mark.parametrize(("groups", "num_blocks", "longest"), [(ALL, [4], 16), (MIXED, [8, 7], 32)])
def test_a_cache_too_small_for_one_request_is_refused_with_both_remedies(groups, num_blocks, longest):
    made = sizing(groups, max_model_len=33)
    with pytest.raises(ConfigError) as caught:
        made.check_fits_one_request(num_blocks)
    message = str(caught.value)
    assert f"cache.memory_bytes to at least {made.num_bytes(made.blocks_of_request(33))}" in message
    assert f"model.max_model_len to {longest}" in message
    made.check_fits_one_request(made.blocks_of_request(33))


def test_a_long_request_needs_few_blocks_of_sliding_window_layers():
    """Shapes of Gemma 3 27B: 62 layers, every sixth sees everything, the others 1024 tokens."""
    shape = CacheShape.uniform(62, 16, 128, 128, 16, torch.bfloat16)
    options = [AttentionOptions(1.0, None if (layer + 1) % 6 == 0 else 1024) for layer in range(62)]
    made = CacheSizing(shape, CacheGroups.of(options, 131072), 131072, 256, 2048)
    before = shape.blocks_for(32768) * shape.bytes_per_block
    after = made.num_bytes(made.blocks_of_request(32768))
    decoding = made.num_bytes(
        [attention_span.most_blocks(32768, 1, 16) for attention_span in made.groups.attention_spans]
    )
    assert [round(count / 2**30, 2) for count in (before, after, decoding)] == [15.5, 3.73, 2.91]


def test_layers_without_attention_belong_to_no_group() -> None:
    window = AttentionOptions(1.0, sliding_window=6)
    groups = CacheGroups.of([None, window, None, AttentionOptions(1.0)], max_model_len=100)
    assert groups.attention_spans == (AttentionSpan(), AttentionSpan(6))
    assert groups.of_layer == (None, 1, None, 0)
    assert CacheGroups.of([None, None], max_model_len=100) == CacheGroups((AttentionSpan(),), (None, None))


def test_a_block_takes_what_the_layers_of_its_group_cache() -> None:
    """Full attention with wide heads, windows with narrow ones, and layers that read others' cache."""
    wide, narrow = LayerShape(2, 16, 16), LayerShape(4, 8, 6)
    shape = CacheShape((narrow, wide, narrow, None, None), 4, torch.float32, sources=((3, 2), (4, 1)))
    groups = CacheGroups((AttentionSpan(), AttentionSpan(6)), (1, 0, 1, 1, 0))
    made = CacheSizing(shape, groups, 100, 3, 16)
    assert made.num_bytes([1]) == 4 * 4 * 2 * 32
    assert made.num_bytes([1, 10]) == 4 * 4 * (2 * 32 + 10 * 2 * 4 * 14)
    cache = PagedCache(shape, [7, 5], torch.device("cpu"), groups=groups)
    assert cache.num_bytes == made.num_bytes([7, 5]) == sum(t.nbytes for t in {*cache.keys, *cache.values})
    assert cache.of_layer(3)[0] is cache.keys[2]
    assert cache.of_layer(4)[1] is cache.values[1]


def test_a_cache_without_layers_has_the_blocks_that_the_scheduler_can_use() -> None:
    shape = CacheShape((None, None), 4, torch.float32)
    made = CacheSizing(shape, CacheGroups.of([None, None], 28), 28, 3, 16)
    assert made.blocks_within(0) == made.blocks_within(1000, use_all=True) == [3 * 7]
    made.check_fits_one_request([21])
    cache = PagedCache(shape, [21], torch.device("cpu"), groups=made.groups)
    assert (cache.num_blocks, cache.num_bytes) == (21, 0)


@pytest.mark.parametrize("use_all", [False, True])
def test_blocks_of_no_bytes_are_not_too_many_and_hold_the_longest_text(use_all):
    shape, groups = CacheShape((None, None), 4, torch.float32), CacheGroups.of([None, None], 1 << 20)
    for longest, expected in ((64, 256 * 16), (1 << 14, 1 << 18), (1 << 21, 1 << 19)):
        assert CacheSizing(shape, groups, longest, 256, 2048).blocks_within(1000, use_all) == [expected]
