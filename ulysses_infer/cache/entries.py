"""Entries: rows that a layer caches beside its keys and values, one per fixed number of consecutive tokens.

An entry of n tokens is made of the tokens `e * n` to `e * n + n - 1` of a text (and of earlier ones), so it depends on
its prefix alone. It lies in the block of its last token: it is shared, evicted and found again with that block, and
needs no state besides. Entries of one token are the inputs of entries that are not complete yet. Their attention span
covers the tokens of an incomplete entry, so that their blocks are freed like those behind a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.errors import ConfigError


@dataclass(frozen=True)
class EntryShape:
    """One kind of entries of one layer. They are the same on every rank."""

    layer: int
    name: str
    width: int
    tokens: int = 1
    """Consecutive tokens per entry."""
    span: AttentionSpan = field(default_factory=AttentionSpan)
    """How far back the layer reads them."""
    is_joined: bool = False
    """Whether attention reads them together with the layer's keys, whose width and dtype they have."""

    def per_block(self, block_size: int) -> int:
        """Rows in a block of `block_size` tokens: at least one, which is used in every `tokens / block_size`-th."""
        return max(1, block_size // self.tokens)

    def check_block_size(self, block_size: int) -> None:
        """Raise `ConfigError` unless every block holds the same number of entries, or every n-th block holds one."""
        if block_size % self.tokens and self.tokens % block_size:
            raise ConfigError(
                f"cache.block_size is {block_size}, but layer {self.layer} caches one entry per {self.tokens} tokens; "
                f"use a multiple or a divisor of {self.tokens}"
            )
