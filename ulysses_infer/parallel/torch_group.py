"""A process group over `deepspeed.comm`: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ulysses_infer.kernels.scaled_rows import QuantisedRows
from ulysses_infer.parallel.layout import Span

INLINE_BYTES = 4096  # sent with the length in one broadcast; the rest of a longer message needs a second
LENGTH_BYTES = 8


class TorchProcessGroup:
    """A `ProcessGroup` over a process group of torch."""

    def __init__(self, process_group: Any) -> None:
        self.process_group = process_group
        self._mine = torch.distributed.get_rank(process_group)

    @property
    def ranks(self) -> list[int]:
        """See `ProcessGroup.ranks`."""
        return torch.distributed.get_process_group_ranks(self.process_group)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """All-reduce in place; returns `partial`."""
        _comm().all_reduce(partial, group=self.process_group)
        return partial

    def sum_add_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int
    ) -> torch.Tensor | QuantisedRows | None:
        """None: see `ProcessGroup.sum_add_norm`."""
        return None

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """sources: each [t, n * h, d]; returns each as [T, h, d], strided views of one all-to-all."""
        sp, local = len(tokens), sources[0].shape[0]
        widths = [x.shape[1] // sp * x.shape[2] for x in sources]
        packed = _packed(sources, sp, widths)
        received = packed.new_empty(tokens[-1].stop, sum(widths))
        self._exchange(received, packed.view(sp * local, sum(widths)), [span.size for span in tokens], [local] * sp)
        return [
            piece.unflatten(-1, (-1, x.shape[-1]))
            for piece, x in zip(received.split(widths, dim=-1), sources, strict=True)
        ]

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """output: [T, C]; returns [t, n * C]."""
        sp, width = len(tokens), output.shape[1]
        local = tokens[self._mine].size
        received = output.new_empty(sp * local, width)
        self._exchange(received, output, [local] * sp, [span.size for span in tokens])
        return received.view(sp, local, width).transpose(0, 1).reshape(local, sp * width)

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """rows: [counts[mine], D]; returns [sum(counts), D]."""
        received = rows.new_empty(sum(counts), rows.shape[1])
        self._exchange(received, rows.repeat(len(counts), 1), list(counts), [rows.shape[0]] * len(counts))
        return received

    def gather_to_first(self, shard: torch.Tensor) -> torch.Tensor | None:
        """Gather every rank's `shard` on the first, [n, *shape]; None elsewhere."""
        shard = shard.contiguous()
        collected = shard.new_empty(len(self.ranks), *shard.shape) if self._mine == 0 else None
        parts = None if collected is None else list(collected)
        _comm().gather(shard, gather_list=parts, dst=self.ranks[0], group=self.process_group)
        return collected

    def _exchange(
        self, received: torch.Tensor, sent: torch.Tensor, receive_rows: list[int], send_rows: list[int]
    ) -> None:
        _comm().all_to_all_single(
            received,
            sent.contiguous(),
            output_split_sizes=receive_rows,
            input_split_sizes=send_rows,
            group=self.process_group,
        )


class TorchMailbox:
    """A `Mailbox` over a gloo process group of all ranks."""

    def __init__(self, process_group: Any) -> None:
        self._process_group = process_group
        self._buffer = torch.zeros(LENGTH_BYTES + INLINE_BYTES, dtype=torch.uint8)

    def send(self, message: bytes) -> None:
        """See `Mailbox.send`."""
        head = len(message).to_bytes(LENGTH_BYTES, "little") + message[:INLINE_BYTES]
        self._buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(self._buffer)
        if len(message) > INLINE_BYTES:
            self._broadcast(torch.frombuffer(bytearray(message[INLINE_BYTES:]), dtype=torch.uint8))

    def receive(self) -> bytes:
        """See `Mailbox.receive`."""
        self._broadcast(self._buffer)
        length = int.from_bytes(self._buffer[:LENGTH_BYTES].numpy().tobytes(), "little")
        inline = self._buffer[LENGTH_BYTES : LENGTH_BYTES + min(length, INLINE_BYTES)].numpy().tobytes()
        if length <= INLINE_BYTES:
            return inline
        rest = torch.empty(length - INLINE_BYTES, dtype=torch.uint8)
        self._broadcast(rest)
        return inline + rest.numpy().tobytes()

    def _broadcast(self, buffer: torch.Tensor) -> None:
        torch.distributed.broadcast(buffer, src=0, group=self._process_group)


def _packed(sources: Sequence[torch.Tensor], sp: int, widths: list[int]) -> torch.Tensor:
    """sources: each [t, sp * h, d]; returns [sp, t, sum of h * d], by receiving rank.

    A view of a single source whose memory is in that order.
    """
    if len(sources) == 1 and sources[0].shape[1] == sp and sources[0].transpose(0, 1).is_contiguous():
        return sources[0].transpose(0, 1)
    packed = sources[0].new_empty(sp, sources[0].shape[0], sum(widths))
    for piece, x, width in zip(packed.split(widths, dim=-1), sources, widths, strict=True):
        piece.copy_(x.reshape(-1, sp, width).transpose(0, 1))
    return packed


def _comm() -> Any:
    """`deepspeed.comm`, imported late because a single-rank engine never needs it."""
    import deepspeed.comm as comm

    return comm
