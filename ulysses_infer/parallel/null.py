"""A process group without other members: the shapes of every exchange without traffic.

For measuring what one rank of a layout computes, alone on one device. The numbers that come out mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.parallel.collectives import Collectives
from ulysses_infer.parallel.layout import Place, Span


class NullGroup:
    """A `Group` (see there) of `size` members, of which this is number `index`; what others send is this one's own.

    Everything is done that a rank does to its own tensors, so copies into and out of exchanges are in what is timed.
    """

    def __init__(self, size: int, index: int) -> None:
        self._size, self._index = size, index

    @property
    def ranks(self) -> list[int]:
        """The members, in the order of the group."""
        return list(range(self._size))

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Nothing is added: `partial` as it is."""
        return partial

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """sources: each [t, n * h, d]; returns each as [T, h, d], the own tokens repeated."""
        heads = [x.shape[1] // self._size for x in sources]
        return [_rows(x[:, :own], tokens[-1].stop) for x, own in zip(sources, heads, strict=True)]

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """output: [T, C]; returns [t, n * C], the own tokens' part n times over."""
        mine = tokens[self._index]
        return output[mine.start : mine.stop].repeat(1, self._size)

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """rows: [counts[mine], D]; returns [sum(counts), D], the own rows repeated."""
        return _rows(rows, sum(counts))

    def gather_to_first(self, shard: torch.Tensor) -> torch.Tensor | None:
        """`shard` as everybody's on the first member; None elsewhere."""
        return torch.stack([shard] * self._size) if self._index == 0 else None


def null_collectives(place: Place) -> Collectives:
    """The collectives of `place`'s mode with nobody else there."""
    sp, tp = place.mode
    return Collectives(
        place,
        NullGroup(sp, place.token_index) if sp > 1 else None,
        NullGroup(tp, place.weight_index) if tp > 1 else None,
    )


def _rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows out of any number of them, over and over; zeros out of none."""
    if rows.shape[0] == 0:
        return rows.new_zeros(count, *rows.shape[1:])
    times = ceil_div(count, rows.shape[0])
    return rows.repeat(times, *(1 for _ in rows.shape[1:]))[:count]
