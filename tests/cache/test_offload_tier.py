"""The tier below the cache: whatever is stored and loaded, moves bring back the content that was evicted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.cache.blocks import OFFLOADED, BlockAllocator
from ulysses_infer.cache.offload import LOAD, SPILL, STORE, Move, OffloadTier
from ulysses_infer.cache.offload_memory import OffloadMemory
from ulysses_infer.cache.offload_sizing import OffloadSizes, offload_sizes
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.config import CacheConfig
from ulysses_infer.errors import ConfigError


def apply(moves, blocks, slots, host_slots):
    """Do moves on `blocks` and `slots`, dicts of contents by number."""
    for kind, _, source, target in moves:
        if kind == STORE:
            slots[target] = blocks[source]
        elif kind == SPILL:
            slots[host_slots + target] = slots[source]
        else:
            assert kind == LOAD
            blocks[target] = slots[source]


texts = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=40)


@given(texts, st.integers(4, 7), st.integers(1, 5), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_block_that_comes_back_has_its_content_and_counts_add_up(texts, num_blocks, host_slots, disk_slots):
    """Each text is allocated after its cached prefix, computed, published and freed; `texts` has (name, blocks)."""
    tier = OffloadTier([host_slots], [disk_slots], [10])
    pools = BlockPools([num_blocks], 1, tier=tier)
    pool, blocks, slots, queries = tier.pools[0], {}, {}, 0
    for name, length in texts:
        contents = [b"%d-%d" % (name, place) for place in range(length)]
        cached, (table,) = pools.match_prefix(contents)
        assert all(content in pool for content, block in zip(contents, table, strict=False) if block == OFFLOADED)
        on_device = table.index(OFFLOADED) if OFFLOADED in table else cached
        assert pools.can_allocate(length, 8, [table], spare=0)
        assert pools.claim([table], contents[:cached]) == on_device
        pools.record_lookup(length, on_device, cached)
        pools.extend([table], length - cached)
        apply(pools.take_moves(), blocks, slots, host_slots)
        assert [blocks[block] for block in table[:cached]] == contents[:cached]
        blocks |= zip(table, contents, strict=True)
        pools.publish([table], length, 0, contents)
        pools.free([table])
        queries += length - on_device
        assert pool.num_in_host <= host_slots
        assert pool.num_on_disk <= disk_slots
        pools.assert_idle()
    assert tier.stats.queries == queries
    assert tier.loaded_bytes == 10 * pool.num_loaded
    assert tier.stats.hits >= pool.num_loaded
    assert pools.reset_prefix_cache()
    assert (pool.num_in_host, pool.num_on_disk) == (0, 0)


def test_the_least_recently_used_block_moves_to_disk_and_then_is_forgotten():
    tier = OffloadTier([2], [1], [1])
    (pool,) = tier.pools
    for number, content in enumerate((b"a", b"b")):
        pool.store(content, number)
    pool.store(b"a", 7)  # which host memory has: it is only younger now
    assert tier.take_moves() == (Move(STORE, 0, 0, 0), Move(STORE, 0, 1, 1))
    pool.store(b"c", 2)
    assert tier.take_moves() == (Move(SPILL, 0, 1, 0), Move(STORE, 0, 2, 1))
    pool.load(b"b", 5)
    assert tier.take_moves() == (Move(LOAD, 0, 2, 5),), "slots on disk are counted after those in host memory"
    pool.store(b"d", 3)
    assert tier.take_moves() == (Move(SPILL, 0, 0, 0), Move(STORE, 0, 3, 0))
    assert [content in pool for content in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    pool.store(b"a", 9)  # from disk, which has it, back to host memory
    assert tier.take_moves() == (Move(SPILL, 0, 1, 0), Move(STORE, 0, 9, 1))
    assert (tier.host_usage, tier.disk_usage, tier.stored_bytes, tier.spilled_bytes) == (1.0, 1.0, 5, 3)
    tier.reset()
    assert b"a" not in pool
    assert (tier.host_usage, tier.disk_usage) == (0.0, 0.0)


def test_what_is_about_to_be_loaded_is_not_given_up_for_what_makes_room_for_it():
    tier = OffloadTier([1], [0], [1])
    allocator = BlockAllocator(2, 1, tier=tier.pools[0])
    for name in (b"a", b"b", b"c"):  # "a" is evicted for "c"
        table = allocator.allocate(1)
        allocator.publish(table, [name])
        allocator.free(table)
    found = allocator.match_prefix([b"a"])
    assert found == [OFFLOADED]
    allocator.claim(found, [b"a"])  # "b" is evicted for it, and the only slot is in use
    assert tier.take_moves()[1:] == (Move(LOAD, 0, 0, found[0]),)
    assert allocator.match_prefix([b"a"]) == found
    assert allocator.match_prefix([b"b"]) == []


def test_blocks_unlikely_to_be_requested_again_are_not_kept():
    tier = OffloadTier([4], [0], [1])
    allocator = BlockAllocator(1, 1, tier=tier.pools[0])
    table = allocator.allocate(1)
    allocator.publish(table, [b"a"])
    allocator.free_out_of_window(table[0], keep_longer=False)
    allocator.allocate(1)
    assert tier.take_moves() == ()


def test_slots_are_divided_as_the_cache_is():
    config = CacheConfig(offload_host_bytes=1000, offload_disk_bytes=35)
    sizes = offload_sizes(config, [10, 20, 5], [40, 10, 4])
    assert sizes.disk_slots == (1, 1, 1)
    assert sizes.host_slots == (1 + 965 * 40 // 620, 1 + 965 * 10 // 620, 1 + 965 * 4 // 620)
    assert 900 < sizes.host_bytes <= 1000
    assert sizes.disk_bytes == 35
    with pytest.raises(
        ConfigError, match=r"^cache\.offload_host_bytes = 34 is less than one block .*, 35 bytes; raise"
    ):
        offload_sizes(CacheConfig(offload_host_bytes=34), [10, 20, 5], [40, 10, 4])
    with pytest.raises(
        ConfigError, match=r"^cache\.offload_disk_bytes = 1 is less than one block of every cache group"
    ):
        offload_sizes(CacheConfig(offload_host_bytes=99, offload_disk_bytes=1), [10, 20, 5], [40, 10, 4])


def test_disk_space_is_a_file_without_a_name_or_a_clear_error(tmp_path):
    sizes = OffloadSizes((2, 1), (3, 2), (16, 0))
    memory = OffloadMemory(sizes, str(tmp_path), pins=False)
    memory.take()
    assert [part.shape for part in (*memory.host, *memory.disk)] == [(2, 16), (1, 0), (3, 16), (2, 0)]
    memory.disk[0].fill_(7)
    assert list(tmp_path.iterdir()) == []
    memory.release()
    assert memory.host == memory.disk == []
    for folder in (tmp_path / "missing", __file__):
        with pytest.raises(ConfigError, match=r"^cache\.offload_disk_folder = .* is not a folder; make it, or give"):
            OffloadMemory(sizes, str(folder), pins=False).take()
    with pytest.raises(ConfigError, match=r"^cache\.offload_disk_folder = '/proc': no file can be made there \(.*\)"):
        OffloadMemory(sizes, "/proc", pins=False).take()
    with pytest.raises(ConfigError, match=r"^cache\.offload_disk_bytes: .* bytes cannot be reserved in .*; lower it"):
        OffloadMemory(OffloadSizes((1,), (1 << 50,), (16,)), str(tmp_path), pins=False).take()
