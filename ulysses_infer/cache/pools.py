"""One block allocator per cache group, and the block tables of sequences over all groups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.blocks import BlockAllocator, PrefixCacheStats

GroupBlockIds = list[list[int]]
"""A sequence's blocks in each group. All tables end at the same block of its text; a table that begins later than the
first is that of layers that no longer see what is before."""


class BlockPools:
    """One pool of blocks a cache group, asked as if they were one.

    A group whose layers see a part of the past alone gives back what is behind it, so that a long text holds no more
    of its blocks than that part and one step. A prefix is cached where the layers of every group find in their blocks
    all that they can see of it.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        block_size: int,
        enable_prefix_caching: bool = True,
        attention_spans: Sequence[AttentionSpan] = (AttentionSpan(),),
    ) -> None:
        """num_blocks, attention_spans: of each group, the one that sees furthest first."""
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.attention_spans = tuple(attention_spans)
        self.pools = [BlockAllocator(count, block_size, enable_prefix_caching) for count in num_blocks]
        self.prefix_stats = PrefixCacheStats()
        self._limited = [
            (group, attention_span, self.pools[group])
            for group, attention_span in enumerate(self.attention_spans)
            if attention_span.is_limited
        ]
        assert len(self.pools) == len(self.attention_spans)

    # -- how much there is -------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks of the first group: what limits how long texts can be."""
        return self.pools[0].num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that every group has free."""
        return min(pool.num_free for pool in self.pools)

    @property
    def num_used(self) -> int:
        """Blocks that some request holds, of all groups."""
        return sum(pool.num_used for pool in self.pools)

    @property
    def usage(self) -> float:
        """Used share, 0 to 1, of the group that has least left."""
        return max(pool.usage for pool in self.pools)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence take while none is given back."""
        return ceil_div(num_tokens, self.block_size)

    def has_room(
        self,
        num_tokens: int,
        step_tokens: int,
        cached: GroupBlockIds,
        spare: int,
        without: Sequence[GroupBlockIds] = (),
    ) -> bool:
        """Whether each group has the blocks that a sequence of so many tokens ever holds beside those `cached`.

        Up to `step_tokens` of it are computed at once; `spare` blocks are to be left over; `without`: the tables of
        sequences that would give theirs back.
        """
        for group, (pool, attention_span, held) in enumerate(
            zip(self.pools, self.attention_spans, cached, strict=True)
        ):
            wanted = max(0, attention_span.most_blocks(num_tokens, step_tokens, self.block_size) - len(held))
            free = pool.num_free - pool.count_free(held) + sum(len(tables[group]) for tables in without)
            if wanted + spare > free:
                return False
        return True

    def most_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """The most blocks of the first group that a sequence of so many tokens ever holds."""
        return self.attention_spans[0].most_blocks(num_tokens, step_tokens, self.block_size)

    # -- what a sequence holds ---------------------------------------------------------------------------------

    def extend(self, tables: GroupBlockIds, count: int) -> list[int]:
        """Append `count` blocks, at most `num_free`, to each table; returns them group by group."""
        added = [pool.allocate(count) for pool in self.pools]
        for table, blocks in zip(tables, added, strict=True):
            table += blocks
        return list(chain.from_iterable(added))

    def free_behind(self, tables: GroupBlockIds, num_blocks: int, position: int, num_prompt_tokens: int) -> None:
        """Give back the blocks that no token from `position` on sees; the tables end at block `num_blocks`.

        They stay cached as long as others are not needed more: those that the end of the prompt sees, longest.
        """
        prompt = (num_prompt_tokens - 1) // self.block_size  # blocks of it that the same prompt can start after
        for group, attention_span, pool in self._limited:
            table = tables[group]
            first, end = num_blocks - len(table), attention_span.first_visible(position) // self.block_size
            if end > first:
                likely = range(self._first_seen(attention_span, prompt), prompt)
                for number, block in enumerate(table[: end - first], first):
                    pool.free_passed(block, number in likely)
                del table[: end - first]

    def free(self, tables: GroupBlockIds) -> None:
        """Give back one reference to every block of a sequence."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.free(table)

    # -- prefixes ----------------------------------------------------------------------------------------------

    def match_prefix(self, block_hashes: Sequence[bytes]) -> tuple[int, GroupBlockIds]:
        """The blocks of the longest prefix that a sequence can start after, and their tables. Takes no reference.

        Of the `block_hashes` each group must still have those that a token after the prefix sees.
        """
        has_full = not self.attention_spans[0].is_limited
        full = self.pools[0].match_prefix(block_hashes) if has_full else []
        length = self._longest_seen(block_hashes, len(full) if has_full else len(block_hashes))
        tables = [full[:length]] if has_full else []
        for _, attention_span, pool in self._limited:
            tables.append(pool.match_prefix(block_hashes[self._first_seen(attention_span, length) : length]))
        return length, tables

    def share(self, tables: GroupBlockIds) -> None:
        """Take one more reference to each block of `tables`, which `match_prefix` has just returned."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.share(table)

    def publish(self, tables: GroupBlockIds, num_blocks: int, index: int, content: bytes) -> None:
        """Let others share block `index` of a sequence, in every group that still holds it; the tables end at block
        `num_blocks`."""
        for pool, table in zip(self.pools, tables, strict=True):
            if num_blocks - index <= len(table):
                pool.publish(table[index - num_blocks], content)

    def reset_prefix_cache(self) -> bool:
        """See `BlockAllocator.reset_prefix_cache`: of all groups or none."""
        if self.num_used:
            return False
        for pool in self.pools:
            pool.reset_prefix_cache()
        return True

    def assert_idle(self) -> None:
        """Raise AssertionError, naming the blocks, unless every block of every group is free."""
        for pool in self.pools:
            pool.assert_idle()

    def _first_seen(self, attention_span: AttentionSpan, num_blocks: int) -> int:
        """The first block that the token after so many full blocks sees."""
        return attention_span.first_visible(num_blocks * self.block_size) // self.block_size

    def _longest_seen(self, block_hashes: Sequence[bytes], length: int) -> int:
        """The longest prefix of up to `length` blocks of which no limited group lacks any that is seen."""
        while True:
            for _, attention_span, pool in self._limited:
                gap = pool.last_missing(block_hashes, self._first_seen(attention_span, length), length)
                if gap is not None:
                    length = gap  # what is longer sees it, too
                    break
            else:
                return length
