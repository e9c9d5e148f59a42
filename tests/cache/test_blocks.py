import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.cache.blocks import BlockAllocator
from ulysses_infer.cache.prefix import block_hash, extend_block_hashes, root_hash

token_lists = st.lists(st.integers(0, 300_000), max_size=40)


def chain(token_ids, block_size=4, salt=""):
    hashes = []
    extend_block_hashes(hashes, token_ids, block_size, salt)
    return hashes


def publish(allocator, token_ids, salt=""):
    """Hold blocks for `token_ids` and publish the full ones."""
    table = allocator.allocate(allocator.blocks_for(len(token_ids)))
    contents = chain(token_ids, allocator.block_size, salt)
    allocator.publish(table[: len(contents)], contents)
    return table


@given(token_lists, st.integers(1, 9), st.data())
def test_block_hashes_extended_piece_by_piece_equal_those_of_the_whole(token_ids, block_size, data):
    hashes = []
    for stop in sorted(data.draw(st.lists(st.integers(0, len(token_ids))))):
        extend_block_hashes(hashes, token_ids[len(hashes) * block_size : stop], block_size)
    extend_block_hashes(hashes, token_ids[len(hashes) * block_size :], block_size)
    assert hashes == chain(token_ids, block_size)
    assert len(hashes) == len(token_ids) // block_size


@given(token_lists, token_lists)
def test_block_hashes_agree_exactly_as_far_as_the_prefixes_do(first, second):
    for number, (a, b) in enumerate(zip(chain(first), chain(second), strict=False), start=1):
        assert (a == b) == (first[: 4 * number] == second[: 4 * number])


def test_salts_share_no_block_hash():
    assert not set(chain(range(16), salt="one")) & set(chain(range(16), salt="two"))


def test_block_hash_is_at_least_128_bits_and_the_same_in_every_process():
    content = block_hash(root_hash(), [1, 2, 3])
    assert len(content) >= 16
    assert content.hex().startswith("267d24b57bbd3fc4")


def test_out_of_window_blocks_are_evicted_before_other_cached_blocks():
    allocator = BlockAllocator(4, 4)
    ended, passed, likely = (publish(allocator, [number] * 4) for number in range(3))
    (blank,) = allocator.allocate(1)
    allocator.free(ended)
    allocator.free_out_of_window(likely[0], keep_longer=True)
    allocator.free_out_of_window(passed[0], keep_longer=False)
    allocator.free_out_of_window(blank, keep_longer=False)
    assert (allocator.num_free, allocator.count_free([*passed, *likely])) == (4, 2)
    assert allocator.match_prefix(chain([1] * 4)) == passed
    assert [allocator.allocate(1) for _ in range(4)] == [[blank], passed, ended, likely]


def test_an_out_of_window_block_that_was_shared_is_evicted_in_normal_order():
    allocator = BlockAllocator(2, 4)
    shared, ended = (publish(allocator, [number] * 4) for number in range(2))
    allocator.share(shared)
    allocator.free(ended)
    for _ in range(2):
        allocator.free_out_of_window(shared[0], keep_longer=False)
    assert [allocator.allocate(1) for _ in range(2)] == [ended, shared]


def test_a_new_allocator_hands_out_every_block_once():
    allocator = BlockAllocator(5, 4)
    assert sorted(allocator.allocate(5)) == [0, 1, 2, 3, 4]
    assert (allocator.num_free, allocator.num_used, allocator.usage) == (0, 5, 1.0)


def test_asking_for_more_blocks_than_are_free_is_refused():
    allocator = BlockAllocator(2, 4)
    with pytest.raises(AssertionError, match="3 blocks requested, 2 free"):
        allocator.allocate(3)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_rounds_up(num_tokens, num_blocks):
    assert BlockAllocator(4, 4).blocks_for(num_tokens) == num_blocks


def test_published_blocks_match_while_held_and_after_they_are_freed():
    allocator = BlockAllocator(8, 4)
    table = publish(allocator, range(10))
    assert allocator.match_prefix(chain(range(12))) == table[:2]
    allocator.free(table)
    assert allocator.num_free == 8
    assert allocator.match_prefix(chain(range(12))) == table[:2]


def test_a_match_ends_at_the_first_block_that_differs():
    allocator = BlockAllocator(8, 4)
    table = publish(allocator, range(12))
    assert allocator.match_prefix(chain([*range(4), 99, *range(5, 12)])) == table[:1]
    assert allocator.match_prefix(chain(range(1, 12))) == []


def test_sharing_a_free_block_makes_it_used():
    allocator = BlockAllocator(3, 4)
    table = publish(allocator, range(8))
    allocator.free(table)
    assert allocator.count_free(table) == 2
    allocator.share(table)
    assert (allocator.num_free, allocator.count_free(table)) == (1, 0)
    assert not set(allocator.allocate(1)) & set(table)


def test_a_shared_block_is_free_when_its_last_reference_is_dropped():
    allocator = BlockAllocator(4, 4)
    table = publish(allocator, range(8))
    allocator.share(table)
    allocator.free(table)
    assert allocator.num_used == 2
    assert [allocator.reference_count(block) for block in table] == [1, 1]
    allocator.free(table)
    allocator.assert_idle()


def test_blocks_without_content_are_reused_before_cached_ones():
    allocator = BlockAllocator(4, 4)
    table = publish(allocator, range(8))
    allocator.free(table)
    assert not set(allocator.allocate(2)) & set(table)
    assert allocator.match_prefix(chain(range(8))) == table


def test_least_recently_freed_content_is_evicted_first():
    allocator = BlockAllocator(3, 4)
    old, middle, new = (publish(allocator, [number] * 4) for number in range(3))
    for table in (old, middle, new):
        allocator.free(table)
    allocator.share(old)  # used again, so now the most recent
    allocator.free(old)
    assert [allocator.allocate(1) for _ in range(3)] == [middle, new, old]


def test_the_tail_of_a_sequence_is_evicted_before_its_head():
    allocator = BlockAllocator(3, 4)
    table = publish(allocator, range(12))
    allocator.free(table)
    assert allocator.allocate(1) == [table[2]]
    assert allocator.match_prefix(chain(range(12))) == table[:2]


def test_an_evicted_block_no_longer_matches():
    allocator = BlockAllocator(1, 4)
    allocator.free(publish(allocator, range(4)))
    allocator.allocate(1)
    assert allocator.match_prefix(chain(range(4))) == []


def test_the_first_of_two_equal_blocks_stays_cached():
    allocator = BlockAllocator(4, 4)
    first = publish(allocator, range(4))
    second = publish(allocator, range(4))
    assert allocator.match_prefix(chain(range(4))) == first
    allocator.free(second)
    assert allocator.allocate(1) == second  # it went back as a block without content
    allocator.free(first)
    assert allocator.match_prefix(chain(range(4))) == first


def test_publishing_a_free_block_is_refused():
    allocator = BlockAllocator(2, 4)
    with pytest.raises(AssertionError, match="block 0 is free"):
        allocator.publish([0], [b"content"])


def test_freeing_a_block_twice_is_refused():
    allocator = BlockAllocator(2, 4)
    table = allocator.allocate(1)
    allocator.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(table)


def test_nothing_is_cached_when_prefix_caching_is_off():
    allocator = BlockAllocator(4, 4, enable_prefix_caching=False)
    table = publish(allocator, range(8))
    allocator.free(table)
    assert allocator.match_prefix(chain(range(8))) == []


def test_reset_forgets_all_content_once_no_block_is_held():
    allocator = BlockAllocator(4, 4)
    table = publish(allocator, range(8))
    assert allocator.reset_prefix_cache() is False
    assert allocator.match_prefix(chain(range(8))) == table
    allocator.free(table)
    assert allocator.reset_prefix_cache() is True
    assert allocator.match_prefix(chain(range(8))) == []
    assert sorted(allocator.allocate(4)) == [0, 1, 2, 3]


def test_assert_idle_names_the_blocks_still_held():
    allocator = BlockAllocator(4, 4)
    allocator.allocate(2)
    with pytest.raises(AssertionError, match=r"2 blocks are not free; held: \[0, 1\]"):
        allocator.assert_idle()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=30))
def test_no_block_is_lost_or_held_twice_in_any_order_of_use(uses):
    allocator, held = BlockAllocator(12, 2), []
    for size, salt in uses:
        while held and allocator.num_free < size:
            allocator.free(held.pop(0))
        cached = allocator.match_prefix(chain(range(2 * size), 2, str(salt)))
        allocator.share(cached)
        table = cached + allocator.allocate(size - len(cached))
        allocator.publish(table, chain(range(2 * size), 2, str(salt)))
        held.append(table)
        for block in range(12):
            assert allocator.reference_count(block) == sum(block in table for table in held)
        assert allocator.num_used == len({block for table in held for block in table})
    for table in held:
        allocator.free(table)
    allocator.assert_idle()
