"""The arithmetic of head shards, modes and token slices. Pure functions without torch.

Source: Hidayetoglu et al., "Shift Parallelism", arXiv 2509.16495, §3. A rank owns head shard `g` permanently,
and a mode `(sp, tp)` only determines how it is used (see docs/life-of-a-request.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.errors import ConfigError


class Mode(NamedTuple):
    """How one forward step splits the work: `sp` token slices times `tp` weight slices."""

    sp: int
    tp: int

    @property
    def world_size(self) -> int:
        """Ranks that a step in this mode uses."""
        return self.sp * self.tp

    def __str__(self) -> str:
        return f"sp{self.sp}xtp{self.tp}"


class Span(NamedTuple):
    """A half-open range `[start, stop)` of rows, heads or tokens."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of items in the range."""
        return self.stop - self.start

    def relative_to(self, outer: Span) -> Span:
        """This span counted from the start of `outer`, which must contain it."""
        assert outer.start <= self.start, (self, outer)
        assert self.stop <= outer.stop, (self, outer)
        return Span(self.start - outer.start, self.stop - outer.start)


def even_span(total: int, index: int, parts: int) -> Span:
    """Part `index` of `total` items divided into `parts` whose sizes differ by at most one.

    Divisions nest: part `i` of `k * n` lies inside part `i // k` of `n`. So every mode finds its weights inside the
    base slice.
    """
    return Span(index * total // parts, (index + 1) * total // parts)


def token_spans(num_tokens: int, sp: int) -> list[Span]:
    """The token slice of each SP index; sizes differ by at most one and cover the batch in order."""
    return [even_span(num_tokens, index, sp) for index in range(sp)]


def key_value_span(num_key_value_heads: int, index: int, parts: int) -> Span:
    """KV heads that the query heads of part `index` of `parts` read: an equal share while `parts` divides the
    heads, otherwise every head that overlaps the part (one head shared with neighbours if `parts` is a multiple)."""
    start = index * num_key_value_heads // parts
    stop = ceil_div((index + 1) * num_key_value_heads, parts)
    return Span(start, stop)


def divisors(number: int) -> list[int]:
    """All positive divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class Layout:
    """The fixed placement of one replica: `world_size = sp0 * tp0` ranks, each with a fixed head shard.

    `rank_order` is "sp_inner" (head shard = rank) or "tp_inner" (tensor parallelism on neighbouring ranks, the
    paper's §3.3 order: rank = s * tp0 + t owns shard t * sp0 + s). `pads_heads`: heads that do not divide over the
    ranks are padded; otherwise they are refused.
    """

    base: Mode
    rank_order: str = "sp_inner"
    pads_heads: bool = True

    @property
    def world_size(self) -> int:
        """Ranks of the replica."""
        return self.base.world_size

    @property
    def shift(self) -> Mode:
        """Full tensor parallelism, the mode for small batches."""
        return Mode(1, self.world_size)

    @property
    def modes(self) -> list[Mode]:
        """Every mode that these weights and this cache support: `tp0 | tp | W`, from base to full TP."""
        return [Mode(self.world_size // tp, tp) for tp in divisors(self.world_size) if tp % self.base.tp == 0]

    def shard_of(self, rank: int) -> int:
        """The head shard `g` that `rank` owns."""
        if self.rank_order == "sp_inner":
            return rank
        s, t = divmod(rank, self.base.tp)
        return t * self.base.sp + s

    def rank_of(self, shard: int) -> int:
        """The rank that owns head shard `shard`; the inverse of `shard_of`."""
        if self.rank_order == "sp_inner":
            return shard
        t, s = divmod(shard, self.base.sp)
        return s * self.base.tp + t

    def sp_group(self, mode: Mode, shard: int) -> list[int]:
        """Ranks of the SP group of `shard` in `mode`, ordered by head shard."""
        first = shard - shard % mode.sp
        return [self.rank_of(g) for g in range(first, first + mode.sp)]

    def tp_group(self, mode: Mode, shard: int) -> list[int]:
        """Ranks of the TP group of `shard` in `mode`, ordered by head shard."""
        return [self.rank_of(g) for g in range(shard % mode.sp, self.world_size, mode.sp)]

    def place(self, mode: Mode, shard: int) -> Place:
        """The place of `shard` in `mode`."""
        return Place(mode=mode, shard=shard, world_size=self.world_size)


class Place(NamedTuple):
    """The slices of weights and tokens that one head shard uses in one mode."""

    mode: Mode
    shard: int
    world_size: int

    @property
    def weight_index(self) -> int:
        """Which of the `tp` weight slices."""
        return self.shard // self.mode.sp

    @property
    def token_index(self) -> int:
        """Which of the `sp` token slices."""
        return self.shard % self.mode.sp


def check_mode(layout: Layout, mode: Mode) -> None:
    """Raise `ConfigError` unless `mode` can run on this layout's weights and cache."""
    if mode not in layout.modes:
        choices = ", ".join(f"[{m.sp}, {m.tp}]" for m in layout.modes)
        raise ConfigError(
            f"mode [{mode.sp}, {mode.tp}] cannot run on base [{layout.base.sp}, {layout.base.tp}]: "
            f"its tp must be a multiple of {layout.base.tp} with sp * tp = {layout.world_size}; choose from {choices}"
        )


def heads_fit(world_size: int, num_attention_heads: int, num_key_value_heads: int) -> bool:
    """Whether every shard gets the same number of query heads, and each shard reads whole KV heads."""
    if num_attention_heads % world_size:
        return False
    return num_key_value_heads % world_size == 0 or world_size % num_key_value_heads == 0


def check_heads(layout: Layout, num_attention_heads: int, num_key_value_heads: int) -> None:
    """Raise `ConfigError`, listing valid world sizes, if the heads cannot be divided over the ranks."""
    if num_attention_heads % num_key_value_heads:
        raise ConfigError(
            f"{num_attention_heads} query heads cannot share {num_key_value_heads} key/value heads evenly; "
            "config.json describes no such model"
        )
    if layout.pads_heads or heads_fit(layout.world_size, num_attention_heads, num_key_value_heads):
        return
    fitting = [w for w in divisors(num_attention_heads) if heads_fit(w, num_attention_heads, num_key_value_heads)]
    raise ConfigError(
        f"{num_attention_heads} query heads and {num_key_value_heads} key/value heads do not divide over "
        f"sp * tp = {layout.world_size} ranks; use sp * tp = {_or_list(fitting)}, or parallel.pad_heads=auto"
    )


def _or_list(numbers: Sequence[int]) -> str:
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
