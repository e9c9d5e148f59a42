"""Block allocator of one cache group: reference counts, free blocks, and cached full blocks."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.cache.free_list import FreeList

OFFLOADED = -1
"""In place of a block that the cache has lost, but the tier below has kept."""


@dataclass
class PrefixCacheStats:
    """Number of tokens looked up and found in the prefix cache since the start."""

    queries: int = 0
    hits: int = 0

    def record(self, queries: int, hits: int) -> None:
        """Count one request that looked up `queries` tokens and found the first `hits` of them."""
        self.queries += queries
        self.hits += hits


class LowerTier(Protocol):
    """What an allocator needs of the tier below (`cache/offload.py`)."""

    def __contains__(self, content: bytes) -> bool: ...

    def store(self, content: bytes, block: int) -> None:
        """Keep the content of `block`, which is about to be reused."""
        ...

    def hold(self, contents: Iterable[bytes]) -> None:
        """Protect `contents` until `release`."""
        ...

    def release(self) -> None:
        """End the protection by `hold`."""
        ...

    def load(self, content: bytes, block: int) -> None:
        """Copy `content` to `block` before the next step."""
        ...


class BlockAllocator:
    """Allocates `num_blocks` cache blocks of `block_size` tokens each. Block ids are the same on every rank.

    A block is held by the requests that have it in their block table (its reference count) or free. A full
    block whose content has been computed can be published under its content's hash; any request may then
    share it, and it keeps its content while free, until it is needed. Empty blocks are reused
    first, then those unlikely to be requested again, then the least recently freed. Every operation is O(1) per block.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, tier: LowerTier | None = None
    ) -> None:
        """tier: keeps what is evicted, except what is unlikely to be requested again; None: it is lost."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._reference_counts: defaultdict[int, int] = defaultdict(int)
        # Free blocks in the order of reuse: empty ones (block 0 first), then cached ones, least recently freed first.
        self._empty = FreeList(num_blocks)
        self._evict_first: OrderedDict[int, None] = OrderedDict()
        self._evict_last: OrderedDict[int, None] = OrderedDict()
        self._was_reused: set[int] = set()  # blocks whose present content was shared at least once
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}
        self._tier = tier

    @property
    def num_free(self) -> int:
        """Number of blocks that no request holds."""
        return len(self._empty) + len(self._evict_first) + len(self._evict_last)

    @property
    def num_used(self) -> int:
        """Number of blocks that requests hold."""
        return self.num_blocks - self.num_free

    @property
    def usage(self) -> float:
        """Used share of the cache, 0 to 1."""
        return self.num_used / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed for `num_tokens` tokens of one sequence."""
        return ceil_div(num_tokens, self.block_size)

    def reference_count(self, block: int) -> int:
        """How many requests hold `block`."""
        return self._reference_counts[block]

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` blocks, at most `num_free`, each with one reference."""
        assert count <= self.num_free, f"{count} blocks requested, {self.num_free} free"
        blocks = self._empty.take(count)
        blocks += self._evict(count - len(blocks))
        for block in blocks:
            self._reference_counts[block] = 1
        return blocks

    def match_prefix(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `block_hashes`, `OFFLOADED` where only the tier below has the
        content. Adds no reference."""
        blocks = []
        for content in block_hashes:
            block = self._block_of_hash.get(content)
            if block is None:
                if self._tier is None or content not in self._tier:
                    break
                block = OFFLOADED
            blocks.append(block)
        return blocks

    def last_uncached(self, block_hashes: Sequence[bytes], start: int, stop: int) -> int | None:
        """The last index in `[start, stop)` whose block is not cached; None if all are."""
        return next((i for i in range(stop - 1, start - 1, -1) if not self._has(block_hashes[i])), None)

    def _has(self, content: bytes) -> bool:
        return content in self._block_of_hash or (self._tier is not None and content in self._tier)

    def count_free(self, blocks: Sequence[int]) -> int:
        """Number of free blocks among `blocks`: `share` lowers `num_free` by it."""
        return sum(self._reference_counts[block] == 0 for block in blocks)

    def claim(self, blocks: list[int], contents: Sequence[bytes]) -> None:
        """`share` the blocks of a cached prefix with these block hashes. Where they are `OFFLOADED`, allocate blocks in
        their place, and have the content loaded before the next step."""
        self.share([block for block in blocks if block != OFFLOADED])
        places = [place for place, block in enumerate(blocks) if block == OFFLOADED]
        if not places:
            return
        assert self._tier is not None
        loaded = [contents[place] for place in places]
        self._tier.hold(loaded)
        allocated = self.allocate(len(places))
        for place, block, content in zip(places, allocated, loaded, strict=True):
            blocks[place] = block
            self._tier.load(content, block)
        self._tier.release()
        self.publish(allocated, loaded)
        self._was_reused.update(allocated)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of `blocks`, which `match_prefix` has just returned."""
        for block in blocks:
            if self._reference_counts[block] == 0:
                del (self._evict_first if block in self._evict_first else self._evict_last)[block]
            self._reference_counts[block] += 1
            self._was_reused.add(block)

    def publish(self, blocks: Sequence[int], contents: Sequence[bytes]) -> None:
        """Add `blocks`, which must be held, full and computed, to the prefix cache under their block hashes `contents`.
        Blocks whose hash is cached already are left out."""
        if not self.enable_prefix_caching:
            return
        counts, block_of_hash, hash_of_block = self._reference_counts, self._block_of_hash, self._hash_of_block
        for block, content in zip(blocks, contents, strict=True):
            assert counts[block] > 0, f"block {block} is free"
            if content not in block_of_hash:
                block_of_hash[content] = block
                hash_of_block[block] = content

    def free(self, block_table: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence. Its last blocks are evicted first, because a cached block is
        useless without those before it."""
        self._release(reversed(block_table), self._evict_last)

    def free_out_of_window(self, block: int, keep_longer: bool) -> None:
        """Drop the reference to a block that left the attention window of its sequence.

        Unless `keep_longer` is set or the block was shared before, it is evicted before other cached blocks. So a long
        text reuses its own blocks instead of evicting useful prefixes.
        """
        keeps = keep_longer or block in self._was_reused
        self._release((block,), self._evict_last if keeps else self._evict_first)

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache, for example after a weight update. Returns False, and does nothing, while any block
        is held, because its sequence would mix old and new content."""
        if self.num_used:
            return False
        for kept in (self._evict_first, self._evict_last):
            self._empty.give_all(kept)
            kept.clear()
        self._was_reused.clear()
        self._block_of_hash.clear()
        self._hash_of_block.clear()
        return True

    def assert_idle(self) -> None:
        """Raise AssertionError, naming the blocks, unless every block is free."""
        held = [block for block, reference_count in self._reference_counts.items() if reference_count]
        if held or self.num_free != self.num_blocks:
            raise AssertionError(f"idle engine, but {self.num_used} blocks are not free; held: {held[:20]}")

    def _evict(self, count: int) -> list[int]:
        """So many cached blocks that are free, without their content."""
        unlikely = min(count, len(self._evict_first))
        blocks = [self._evict_first.popitem(last=False)[0] for _ in range(unlikely)]
        blocks += [self._evict_last.popitem(last=False)[0] for _ in range(count - unlikely)]
        contents = [self._hash_of_block.pop(block) for block in blocks]
        for content in contents:
            del self._block_of_hash[content]
        if self._tier is not None:
            for content, block in zip(contents[unlikely:], blocks[unlikely:], strict=True):
                self._tier.store(content, block)
        self._was_reused.difference_update(blocks)
        return blocks

    def _release(self, blocks: Iterable[int], kept: OrderedDict[int, None]) -> None:
        """Drop a reference to each block; those with content that nobody holds any more join `kept`."""
        counts, cached, empty = self._reference_counts, self._hash_of_block, self._empty
        for block in blocks:
            assert counts[block] > 0, f"block {block} freed twice"
            counts[block] -= 1
            if counts[block]:
                continue
            if block in cached:
                kept[block] = None
            else:
                empty.give(block)
