"""The few exchanges a step needs, over `deepspeed.comm`. Shapes only; who owns what is decided in `layout.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ulysses_infer.parallel.layout import Place, Span


class CollectiveClock:
    """Seconds this rank spent in each kind of collective, waiting for the others included.

    Where collectives run on a stream of their own (NCCL) it is the time to enqueue them.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Add the time of what runs inside to `kind`."""
        started = time.perf_counter()
        yield
        self._seconds[kind] = self._seconds.get(kind, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """What was added since the last call, by kind."""
        taken, self._seconds = self._seconds, {}
        return taken


@dataclass(frozen=True)
class Collectives:
    """The collectives of one mode on one rank. A group is None where the mode has a single member."""

    place: Place
    sp_group: Any
    tp_group: Any
    clock: CollectiveClock = field(default_factory=CollectiveClock)

    def tokens_to_heads(self, packed: torch.Tensor, tokens: list[Span]) -> torch.Tensor:
        """The forward all-to-all of Ulysses: my tokens for every shard become every token for my shard.

        packed: [sp, t, C], row block `j` for the j-th member of the SP group; returns [T, C] in batch order.
        """
        sp, local, width = packed.shape
        received = packed.new_empty(tokens[-1].stop, width)
        self._exchange(received, packed.reshape(sp * local, width), [span.size for span in tokens], [local] * sp)
        return received

    def heads_to_tokens(self, output: torch.Tensor, tokens: list[Span]) -> torch.Tensor:
        """The all-to-all back: all tokens of my heads become my tokens with the heads of the whole SP group.

        output: [T, C]; returns [t, sp * C] with the group's shards in order.
        """
        sp, width = len(tokens), output.shape[1]
        local = tokens[self.place.token_index].size
        received = output.new_empty(sp * local, width)
        self._exchange(received, output, [local] * sp, [span.size for span in tokens])
        return received.view(sp, local, width).transpose(0, 1).reshape(local, sp * width)

    def gather_rows(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Concatenate uneven rows over the SP group. rows: [counts[mine], D]; returns [sum(counts), D]."""
        if self.sp_group is None:
            return rows
        sp, mine = len(counts), rows.shape[0]
        received = rows.new_empty(sum(counts), rows.shape[1])
        self._exchange(received, rows.repeat(sp, 1), counts, [mine] * sp)
        return received

    def sum_over_tp(self, partial: torch.Tensor) -> torch.Tensor:
        """Add the partial results of the TP group in place; returns `partial`."""
        if self.tp_group is not None:
            with self.clock.timing("all_reduce"):
                _comm().all_reduce(partial, group=self.tp_group)
        return partial

    def _exchange(
        self, received: torch.Tensor, sent: torch.Tensor, receive_rows: list[int], send_rows: list[int]
    ) -> None:
        sent = sent.contiguous()
        with self.clock.timing("all_to_all"):
            _comm().all_to_all_single(
                received, sent, output_split_sizes=receive_rows, input_split_sizes=send_rows, group=self.sp_group
            )


def gather_to_first(shard: torch.Tensor, group: Any, rank: int, order: list[int]) -> list[torch.Tensor] | None:
    """Collect equal-shaped `shard`s on rank 0, listed in `order` of ranks (head-shard order); None elsewhere."""
    if group is None:
        return [shard]
    shard = shard.contiguous()
    collected = [torch.empty_like(shard) for _ in order] if rank == 0 else None
    _comm().gather(shard, gather_list=collected, dst=0, group=group)
    return None if collected is None else [collected[r] for r in order]


def _comm() -> Any:
    """`deepspeed.comm`, imported late: a single-rank engine never needs it."""
    import deepspeed.comm as comm

    return comm
