"""Divides the cache memory among cache groups, and computes what one request needs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.paged import CacheShape
from ulysses_infer.errors import ConfigError

MAX_EMPTY_BLOCKS = 1 << 18


@dataclass(frozen=True)
class CacheSizing:
    """Computes block counts of a rank's cache. Lists are per cache group, longest attention span first."""

    shape: CacheShape
    groups: CacheGroups
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def num_bytes(self, num_blocks: Sequence[int]) -> int:
        """Bytes of `num_blocks[group]` blocks in each of the first cache groups."""
        return sum(count * size for count, size in zip(num_blocks, self._block_bytes, strict=False))

    @cached_property
    def _block_bytes(self) -> list[int]:
        """Bytes of one block of each cache group, in all of the group's layers and entries."""
        return [self.shape.bytes_of_group(self.groups, group) for group in range(len(self.groups.attention_spans))]

    @property
    def longest_request_bytes(self) -> int:
        """Bytes of the blocks of a request of `max_model_len` tokens."""
        return self.num_bytes(self.blocks_of_request(self.max_model_len))

    def blocks_of_request(self, num_tokens: int) -> list[int]:
        """The most blocks that a request of `num_tokens` tokens ever holds."""
        step, size = self.max_num_batched_tokens, self.shape.block_size
        return [attention_span.most_blocks(num_tokens, step, size) for attention_span in self.groups.attention_spans]

    def blocks_per_group(self, num_blocks: int) -> list[int]:
        """Block counts with `num_blocks` in the first cache group. The others get the same, or the most that running
        requests can hold if that is less.

        So no request ever waits for blocks of another cache group than the first.
        """
        return self._blocks_per_group(num_blocks, self.max_num_seqs)

    def blocks_within(self, num_bytes: int, use_all: bool = False) -> list[int]:
        """The block counts that fit into `num_bytes`; unless `use_all`, at most what the scheduler can use.

        As `blocks_per_group`, but sliding windows are sized for fewer requests if a request of `max_model_len` tokens
        would not fit otherwise.
        """
        per_block = self._block_bytes[0]  # 0 if no layer has attention
        most = num_bytes // per_block if use_all and per_block else self._max_usable_blocks(0, self.max_num_seqs)
        if not per_block:  # blocks only identify prefixes, at a few dozen bytes each
            return [max(min(most, MAX_EMPTY_BLOCKS), self.blocks_of_request(self.max_model_len)[0])]
        first = self._largest(range(most + 1), self.blocks_per_group, num_bytes)
        longest = self.blocks_of_request(self.max_model_len)
        if first >= longest[0] or self.num_bytes(longest) > num_bytes:
            return self.blocks_per_group(first)
        requests = range(self.max_num_seqs + 1)
        return self._blocks_per_group(
            longest[0], self._largest(requests, lambda count: self._blocks_per_group(longest[0], count), num_bytes)
        )

    def check_fits_one_request(self, num_blocks: Sequence[int], in_blocks: bool = False) -> None:
        """Raise `ConfigError` if these blocks cannot hold one request of `max_model_len` tokens.

        in_blocks: whether the size is given in blocks instead of bytes.
        """
        needed = self.blocks_of_request(self.max_model_len)
        if all(have >= want for have, want in zip(num_blocks, needed, strict=True)):
            return
        held = self.num_bytes(num_blocks)
        lengths = range(self.max_model_len + 1)
        longest = bisect_right(lengths, held, key=lambda length: self.num_bytes(self.blocks_of_request(length))) - 1
        key, least = ("num_blocks", max(needed)) if in_blocks else ("memory_bytes", self.num_bytes(needed))
        raise ConfigError(
            f"the cache holds {num_blocks[0]} blocks = {num_blocks[0] * self.shape.block_size} tokens, less than one "
            f"request of max_model_len {self.max_model_len} ({self.num_bytes(needed)} bytes); raise cache.{key} to at "
            f"least {least} or lower model.max_model_len to {longest}"
        )

    def _blocks_per_group(self, num_blocks: int, num_requests: int) -> list[int]:
        others = range(1, len(self.groups.attention_spans))
        least = self.blocks_of_request(self.max_model_len)
        wanted = [max(least[group], self._max_usable_blocks(group, num_requests)) for group in others]
        return [num_blocks, *(min(num_blocks, count) for count in wanted)]

    def _max_usable_blocks(self, group: int, num_requests: int) -> int:
        """The most blocks of a cache group that `num_requests` requests can hold, plus those that `Scheduler` keeps
        free to start another."""
        attention_span, size = self.groups.attention_spans[group], self.shape.block_size
        whole = num_requests * self.shape.blocks_for(self.max_model_len)
        if attention_span.length is None:
            return whole
        each = attention_span.most_blocks(self.max_model_len, 1, size) + 2
        return min(whole, num_requests * each + self.shape.blocks_for(self.max_num_batched_tokens))

    def _largest(self, counts: range, blocks: Callable[[int], list[int]], num_bytes: int) -> int:
        """The last of `counts` whose blocks fit into `num_bytes`."""
        return counts[max(0, bisect_right(counts, num_bytes, key=lambda count: self.num_bytes(blocks(count))) - 1)]
