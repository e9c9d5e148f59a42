"""A process group that does not communicate: tensors have the shapes of each exchange, without any traffic.

Used to measure, on one device, what one rank of a layout computes. The resulting numbers are meaningless.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.kernels.scaled_rows import QuantisedRows
from ulysses_infer.parallel.collectives import Collectives
from ulysses_infer.parallel.layout import Place, Span


class NullProcessGroup:
    """A `ProcessGroup` of `size` ranks seen from rank `index`; what other ranks would send is this rank's own data.

    A rank's work on its own tensors is done, so that copies into and out of exchanges are measured too.
    """

    def __init__(self, size: int, index: int) -> None:
        self._size, self._index = size, index

    @property
    def ranks(self) -> list[int]:
        """See `ProcessGroup.ranks`."""
        return list(range(self._size))

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Returns `partial` unchanged."""
        return partial

    def sum_add_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int
    ) -> torch.Tensor | QuantisedRows | None:
        """None: see `ProcessGroup.sum_add_norm`."""
        return None

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """sources: each [t, n * h, d]; returns each as [T, h, d], this rank's tokens repeated."""
        heads = [x.shape[1] // self._size for x in sources]
        return [_repeat_rows(x[:, :own], tokens[-1].stop) for x, own in zip(sources, heads, strict=True)]

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """output: [T, C]; returns [t, n * C], this rank's heads repeated n times."""
        mine = tokens[self._index]
        return output[mine.start : mine.stop].repeat(1, self._size)

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """rows: [counts[index], D]; returns [sum(counts), D], this rank's rows repeated."""
        return _repeat_rows(rows, sum(counts))

    def gather_to_first(self, shard: torch.Tensor) -> torch.Tensor | None:
        """`shard` repeated n times on the first rank; None elsewhere."""
        return torch.stack([shard] * self._size) if self._index == 0 else None


def null_collectives(place: Place) -> Collectives:
    """The collectives of `place`'s mode, without communication."""
    sp, tp = place.mode
    return Collectives(
        place,
        NullProcessGroup(sp, place.token_index) if sp > 1 else None,
        NullProcessGroup(tp, place.weight_index) if tp > 1 else None,
        world_group=NullProcessGroup(place.world_size, place.shard) if place.world_size > 1 else None,
    )


def _repeat_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows, repeated from `rows`; zeros if there are none."""
    if rows.shape[0] == 0:
        return rows.new_zeros(count, *rows.shape[1:])
    times = ceil_div(count, rows.shape[0])
    return rows.repeat(times, *(1 for _ in rows.shape[1:]))[:count]
