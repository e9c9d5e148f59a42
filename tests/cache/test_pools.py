"""Block pools of several cache groups: out-of-window blocks are freed, and cached prefixes are complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.cache.prefix import extend_block_hashes

MIXED = (AttentionSpan(), AttentionSpan(6))
limits = st.builds(AttentionSpan, st.none() | st.integers(1, 20), st.none() | st.integers(1, 20))
kinds = st.lists(limits, min_size=1, max_size=4).map(
    lambda found: tuple(sorted(set(found), key=lambda attention_span: attention_span.length or 99, reverse=True))
)


def chain(count, block_size, text=0):
    hashes = []
    extend_block_hashes(hashes, [text] * (count * block_size), block_size)
    return hashes


def compute(pools, num_blocks, text=0):
    """Compute and publish a text block by block, freeing blocks it no longer sees; returns its tables."""
    tables, contents = [[] for _ in pools.attention_spans], chain(num_blocks, pools.block_size, text)
    for block, content in enumerate(contents):
        pools.free_out_of_window_blocks(tables, block, block * pools.block_size, num_blocks * pools.block_size)
        pools.extend(tables, 1)
        pools.publish(tables, block + 1, block, [content])
    return tables


def visible_blocks(attention_span, num_blocks, block_size):
    """The blocks of a prefix that the token after it sees, by trying each position."""
    query = num_blocks * block_size
    return {position // block_size for position in range(attention_span.first_visible(query), query)}


def test_a_long_text_holds_all_of_the_first_group_and_a_window_of_the_other():
    pools = BlockPools([40, 10], 4, attention_spans=MIXED)
    tables = compute(pools, 30)
    assert [len(table) for table in tables] == [30, 3]
    assert (pools.num_used, pools.num_free, pools.usage) == (33, 7, 30 / 40)
    pools.free(tables)
    pools.assert_idle()


def test_only_blocks_before_the_window_are_freed_and_only_once():
    pools = BlockPools([10, 10], 4, attention_spans=MIXED)
    tables = [[], []]
    assert pools.extend(tables, 4) == [*tables[0], *tables[1]]
    first, second = tables[1][:2]
    for position, gone in ((8, 0), (9, 1), (12, 1), (13, 2), (13, 2)):
        pools.free_out_of_window_blocks(tables, 4, position, 16)
        assert [pools.pools[1].reference_count(block) for block in (first, second)] == [gone < 1, gone < 2]
        assert [len(table) for table in tables] == [4, 4 - gone]


@pytest.mark.parametrize(
    "attention_spans", [MIXED, (AttentionSpan(6),), (AttentionSpan(chunk_size=8), AttentionSpan(3))]
)
def test_a_continuation_hits_the_blocks_just_computed(attention_spans):
    pools = BlockPools([60] * len(attention_spans), 4, attention_spans=attention_spans)
    tables = compute(pools, 20)
    length, found = pools.match_prefix(chain(30, 4))
    assert length == 20
    for attention_span, table, blocks in zip(attention_spans, tables, found, strict=True):
        wanted = len(visible_blocks(attention_span, 20, 4))
        assert blocks == table[len(table) - wanted :]
    pools.share(found)
    assert [pools.pools[0].reference_count(block) for block in found[0]] == [2] * len(found[0])
    pools.free(found)
    pools.free(tables)
    pools.assert_idle()


def test_a_prefix_with_evicted_window_blocks_is_not_a_hit():
    pools = BlockPools([60, 6], 4, attention_spans=MIXED)
    pools.free(compute(pools, 20))
    assert pools.match_prefix(chain(12, 4)) == (0, [[], []]), "its window was evicted for the blocks that followed"
    assert pools.match_prefix(chain(20, 4))[0] == 20
    taken = pools.pools[1].allocate(5)
    assert pools.match_prefix(chain(20, 4)) == (0, [[], []])
    assert len(pools.pools[0].match_prefix(chain(20, 4))) == 20, "the first group still has all of it"
    pools.pools[1].free(taken)


def test_a_long_text_reuses_its_own_blocks_before_evicting_others():
    pools = BlockPools([200, 20], 4, attention_spans=MIXED)
    pools.free(compute(pools, 20, text=1))
    long = compute(pools, 100, text=2)
    assert pools.match_prefix(chain(25, 4, text=1))[0] == 20, "its end is still there"
    pools.free(long)
    assert pools.match_prefix(chain(110, 4, text=2))[0] == 100


def test_the_end_of_a_prompt_stays_cached_while_its_answer_grows():
    pools = BlockPools([200, 20], 4, attention_spans=MIXED)
    tables, contents = [[], []], chain(100, 4)
    for block, content in enumerate(contents):
        pools.free_out_of_window_blocks(tables, block, block * 4, num_prompt_tokens=43)
        pools.extend(tables, 1)
        pools.publish(tables, block + 1, block, [content])
    assert pools.match_prefix(contents[:10])[0] == 10
    assert pools.match_prefix(contents[:9])[0] == 0, "its blocks were evicted before it was requested"


def test_blocks_that_were_shared_stay_cached_longer():
    pools = BlockPools([200, 20], 4, attention_spans=MIXED)
    tables = compute(pools, 12)
    shared = pools.match_prefix(chain(9, 4))
    assert shared[0] == 9, "a prefix that texts share"
    pools.share(shared[1])
    other = shared[1]
    pools.extend(other, 1)
    pools.free_out_of_window_blocks(other, 10, 80, num_prompt_tokens=80)
    pools.free(other)
    pools.free(tables)
    compute(pools, 100, text=2)
    assert pools.match_prefix(chain(9, 4))[0] == 9
    assert pools.match_prefix(chain(8, 4))[0] == 0


@given(st.data(), kinds, st.integers(1, 5), st.integers(1, 12))
def test_a_hit_is_the_longest_complete_prefix(data, attention_spans, block_size, count):
    """Whichever blocks are evicted, the hit is the one that trying every length finds."""
    pools = BlockPools([count] * len(attention_spans), block_size, attention_spans=attention_spans)
    contents, cached = chain(count, block_size), []
    for pool in pools.pools:
        kept = data.draw(st.sets(st.integers(0, count - 1)))
        blocks = pool.allocate(count)
        pool.publish([blocks[block] for block in kept], [contents[block] for block in kept])
        pool.free(blocks)
        cached.append({block: blocks[block] for block in kept})
    expected = max(
        length
        for length in range(count + 1)
        if all(
            visible_blocks(attention_span, length, block_size) <= kept.keys()
            for attention_span, kept in zip(attention_spans, cached, strict=True)
        )
    )
    length, tables = pools.match_prefix(contents)
    assert length == expected
    for attention_span, kept, table in zip(attention_spans, cached, tables, strict=True):
        assert table == [kept[block] for block in sorted(visible_blocks(attention_span, length, block_size))]


def test_allocation_needs_free_blocks_in_every_cache_group():
    pools = BlockPools([20, 6], 4, attention_spans=MIXED)
    nothing = [[], []]
    assert pools.can_allocate(80, 8, nothing, spare=0), "a window of 6 and a step of 8 take up to 5 blocks"
    assert not pools.can_allocate(81, 8, nothing, spare=0)
    assert pools.can_allocate(76, 8, nothing, spare=1)
    assert not pools.can_allocate(72, 8, nothing, spare=2)
    others = [[], []]
    pools.extend(others, 3)
    assert not pools.can_allocate(40, 8, nothing, spare=0)
    assert pools.can_allocate(40, 8, nothing, spare=0, without=[others])


def test_an_idle_engine_has_every_block_of_every_group():
    pools = BlockPools([4, 4], 4, attention_spans=MIXED)
    pools.assert_idle()
    pools.pools[1].allocate(1)
    assert pools.reset_prefix_cache() is False
    with pytest.raises(AssertionError, match="1 blocks are not free"):
        pools.assert_idle()
