"""One block allocator per cache group, and the block tables of sequences over all groups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.blocks import OFFLOADED, BlockAllocator, PrefixCacheStats
from ulysses_infer.cache.offload import Move, OffloadTier
from ulysses_infer.cache.snapshots import SnapshotPool

GroupBlockIds = list[list[int]]
"""A sequence's block tables, one per cache group. All end at the same block of the text. A table starts later if the
blocks before are outside of the attention window."""


class BlockPools:
    """One block allocator per cache group, behind one interface.

    Cache groups with a limited attention span free the blocks that leave it, so a long text holds at most one span and
    one step of their blocks. A prefix is cached if every cache group has all blocks that its layers attend to.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        block_size: int,
        enable_prefix_caching: bool = True,
        attention_spans: Sequence[AttentionSpan] = (AttentionSpan(),),
        snapshots: SnapshotPool | None = None,
        tier: OffloadTier | None = None,
    ) -> None:
        """num_blocks, attention_spans: one per cache group, longest span first. snapshots: of recurrent states; None if
        the model has none. tier: keeps evicted blocks; None: they are lost."""
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.snapshots = snapshots
        self.attention_spans = tuple(attention_spans)
        self.tier = tier
        lower = [None] * len(num_blocks) if tier is None else tier.pools[: len(num_blocks)]
        self.pools = [
            BlockAllocator(count, block_size, enable_prefix_caching, below)
            for count, below in zip(num_blocks, lower, strict=True)
        ]
        self.prefix_stats = PrefixCacheStats()
        self._limited = [
            (group, attention_span, self.pools[group])
            for group, attention_span in enumerate(self.attention_spans)
            if attention_span.is_limited
        ]
        assert len(self.pools) == len(self.attention_spans)

    # -- capacity ----------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks of the first cache group, which limits the length of texts."""
        return self.pools[0].num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that are free in every cache group."""
        return min(pool.num_free for pool in self.pools)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold, over all cache groups."""
        return sum(pool.num_used for pool in self.pools)

    @property
    def usage(self) -> float:
        """Used share, 0 to 1, of the fullest cache group."""
        return max(pool.usage for pool in self.pools)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed for `num_tokens` tokens of one sequence if none is freed."""
        return ceil_div(num_tokens, self.block_size)

    def can_allocate(
        self,
        num_tokens: int,
        step_tokens: int,
        cached: GroupBlockIds,
        spare: int,
        without: Sequence[GroupBlockIds] = (),
    ) -> bool:
        """Whether each cache group has the blocks for a sequence of `num_tokens` tokens, in addition to those `cached`.

        step_tokens: the most tokens computed in one step; spare: number of blocks to keep free; without: block tables
        of sequences that would be preempted.
        """
        for group, (pool, attention_span, held) in enumerate(
            zip(self.pools, self.attention_spans, cached, strict=True)
        ):
            present = [block for block in held if block != OFFLOADED]
            wanted = max(0, attention_span.most_blocks(num_tokens, step_tokens, self.block_size) - len(present))
            free = pool.num_free - pool.count_free(present) + sum(len(tables[group]) for tables in without)
            if wanted + spare > free:
                return False
        return True

    def most_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """The most blocks of the first cache group that a sequence of `num_tokens` tokens ever holds."""
        return self.attention_spans[0].most_blocks(num_tokens, step_tokens, self.block_size)

    # -- sequences ---------------------------------------------------------------------------------------------

    def extend(self, tables: GroupBlockIds, count: int) -> list[int]:
        """Append `count` blocks, at most `num_free`, to each table. Returns the new blocks, by cache group."""
        added = [pool.allocate(count) for pool in self.pools]
        for table, blocks in zip(tables, added, strict=True):
            table += blocks
        return list(chain.from_iterable(added))

    def free_out_of_window_blocks(
        self, tables: GroupBlockIds, num_blocks: int, position: int, num_prompt_tokens: int
    ) -> None:
        """Free the blocks that no token from `position` on attends to; the tables end at block `num_blocks`.

        They stay in the prefix cache until evicted; those visible at the end of the prompt are evicted last.
        """
        prompt = (num_prompt_tokens - 1) // self.block_size  # full blocks that a repeated prompt can reuse
        for group, attention_span, pool in self._limited:
            table = tables[group]
            first, end = num_blocks - len(table), attention_span.first_visible(position) // self.block_size
            if end > first:
                likely = range(self._first_visible_block(attention_span, prompt), prompt)
                for number, block in enumerate(table[: end - first], first):
                    pool.free_out_of_window(block, number in likely)
                del table[: end - first]

    def free(self, tables: GroupBlockIds) -> None:
        """Drop one reference to every block of a sequence."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.free(table)

    # -- prefix caching ----------------------------------------------------------------------------------------

    def match_prefix(self, block_hashes: Sequence[bytes]) -> tuple[int, GroupBlockIds]:
        """The number of blocks of the longest cached prefix, and its block tables, with `OFFLOADED` in place of blocks
        that only the tier has. Adds no reference.

        Every cache group must still have the blocks that a token after the prefix attends to. If the model has
        recurrent layers, there must be a snapshot of the states after the prefix.
        """
        length, tables = self.match_blocks(block_hashes)
        while length and self.snapshots is not None:
            with_snapshot = self.snapshots.longest(block_hashes, length)
            if with_snapshot == length:
                break
            length, tables = self.match_blocks(block_hashes[:with_snapshot])
        return length, tables

    def match_blocks(self, block_hashes: Sequence[bytes]) -> tuple[int, GroupBlockIds]:
        """As `match_prefix`, without regard to snapshots."""
        has_full = not self.attention_spans[0].is_limited
        full = self.pools[0].match_prefix(block_hashes) if has_full else []
        length = self._longest_cached_prefix(block_hashes, len(full) if has_full else len(block_hashes))
        tables = [full[:length]] if has_full else []
        for _, attention_span, pool in self._limited:
            tables.append(pool.match_prefix(block_hashes[self._first_visible_block(attention_span, length) : length]))
        return length, tables

    def share(self, tables: GroupBlockIds) -> None:
        """Add a reference to each block of `tables`, which `match_prefix` has just returned."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.share(table)

    def claim(self, tables: GroupBlockIds, contents: Sequence[bytes]) -> int:
        """`share` a prefix with these block hashes; blocks that only the tier has are allocated, in place, and loaded
        before the next step. Returns the leading blocks that no cache group has to load."""
        length = len(contents)
        present = min((_end_of_present(table, length) for table in tables), default=length)
        for pool, table in zip(self.pools, tables, strict=True):
            pool.claim(table, contents[length - len(table) :])
        return present

    def take_moves(self) -> tuple[Move, ...]:
        """The copies from and to the tier that the next step plan, which is made now, carries."""
        if self.snapshots is not None:
            self.snapshots.end_plan()
        return () if self.tier is None else self.tier.take_moves()

    def record_lookup(self, num_tokens: int, num_present: int, num_cached: int) -> None:
        """Count a request whose first `num_cached` of `num_tokens` tokens were cached, `num_present` not in the tier
        alone."""
        self.prefix_stats.record(num_tokens, num_present)
        if self.tier is not None:
            self.tier.stats.record(num_tokens - num_present, num_cached - num_present)

    def publish(self, tables: GroupBlockIds, num_blocks: int, start: int, contents: Sequence[bytes]) -> None:
        """Add the blocks of a sequence from `start` on, of these block hashes, to the prefix cache of each cache group
        that holds them; the tables end at block `num_blocks`."""
        for pool, table in zip(self.pools, tables, strict=True):
            offset = num_blocks - len(table)
            first, end = max(start, offset), start + len(contents)
            if first < end:
                pool.publish(table[first - offset : end - offset], contents[first - start :])

    def reset_prefix_cache(self) -> bool:
        """See `BlockAllocator.reset_prefix_cache`; resets all cache groups or none."""
        if self.num_used:
            return False
        for pool in self.pools:
            pool.reset_prefix_cache()
        if self.snapshots is not None:
            self.snapshots.reset()
        self.reset_tier()
        return True

    def reset_tier(self) -> None:
        """Empty the tier, whatever requests hold. No request waits for a load: the last plan has been sent."""
        if self.tier is not None:
            self.tier.reset()

    def assert_idle(self) -> None:
        """Raise AssertionError, naming the blocks, unless every block of every group is free."""
        for pool in self.pools:
            pool.assert_idle()
        if self.snapshots is not None:
            self.snapshots.assert_idle()

    def _first_visible_block(self, attention_span: AttentionSpan, num_blocks: int) -> int:
        """The first block that the token after `num_blocks` full blocks attends to."""
        return attention_span.first_visible(num_blocks * self.block_size) // self.block_size

    def _longest_cached_prefix(self, block_hashes: Sequence[bytes], length: int) -> int:
        """Length of the longest prefix, at most `length` blocks, whose visible blocks all limited cache groups have."""
        while True:
            for _, attention_span, pool in self._limited:
                gap = pool.last_uncached(block_hashes, self._first_visible_block(attention_span, length), length)
                if gap is not None:
                    length = gap  # every longer prefix needs this block too
                    break
            else:
                return length


def _end_of_present(table: Sequence[int], length: int) -> int:
    """Blocks before the first `OFFLOADED` one of a table that ends at block `length`."""
    return length - len(table) + table.index(OFFLOADED) if OFFLOADED in table else length
