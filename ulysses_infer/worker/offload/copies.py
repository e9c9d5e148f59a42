"""Copies between blocks and slots in host memory: directly on a CPU, by a stream of their own on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from ulysses_infer.worker.offload.block_rows import BlockRows
from ulysses_infer.worker.transfer import make_inputs

STAGING_BYTES = 32 << 20


class Copies(Protocol):
    """How blocks are copied. blocks, slots: [n] each, one for one."""

    @contextmanager
    def before_step(self) -> Iterator[None]:
        """Around the copies before a step: they come after the steps before, and before this one as far as it may
        read or overwrite a block."""
        ...

    def store(self, rows: BlockRows, blocks: Sequence[int], memory: torch.Tensor, slots: Sequence[int]) -> None:
        """Copy blocks to slots of `memory`, [m, bytes of a row] uint8."""
        ...

    def load(self, rows: BlockRows, memory: torch.Tensor, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy slots to blocks."""
        ...

    def wait(self) -> None:
        """Wait until memory has what was stored, and is not read any more."""
        ...


class DirectCopies:
    """For a CPU: everything is done when a call returns."""

    @contextmanager
    def before_step(self) -> Iterator[None]:
        """See `Copies.before_step`."""
        yield

    def store(self, rows: BlockRows, blocks: Sequence[int], memory: torch.Tensor, slots: Sequence[int]) -> None:
        """See `Copies.store`."""
        rows.copy_out(torch.tensor(blocks), memory, torch.tensor(slots))

    def load(self, rows: BlockRows, memory: torch.Tensor, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """See `Copies.load`."""
        rows.copy_in(memory, torch.tensor(slots), torch.tensor(blocks))

    def wait(self) -> None:
        """See `Copies.wait`."""


class StagedCopies:
    """For a GPU: blocks are gathered into a buffer on the device, one contiguous row each, and rows are copied from and
    to pinned memory, consecutive ones together.

    A step waits until the blocks that it overwrites are in the buffer, not until they are in host memory; and for all
    loads. Blocks that are contiguous anyway need no buffer; a step waits for their copies.
    """

    def __init__(self, device: torch.device, row_bytes: Sequence[int]) -> None:
        """row_bytes: of the rows that are not contiguous in the cache."""
        self._device, self._inputs = device, make_inputs(device)
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._touched = torch.cuda.Event() if on_gpu else None
        """After the last operation that reads or writes a block."""
        size = staging_bytes(row_bytes)
        self._staging = torch.empty(size, dtype=torch.uint8, device=device)
        most = max((size // max(1, each) for each in row_bytes), default=0)
        self._numbers = torch.arange(most, device=device)

    @contextmanager
    def before_step(self) -> Iterator[None]:
        """See `Copies.before_step`."""
        if self._stream is None or self._touched is None:
            yield
            return
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        main.wait_event(self._touched)

    def store(self, rows: BlockRows, blocks: Sequence[int], memory: torch.Tensor, slots: Sequence[int]) -> None:
        """See `Copies.store`."""
        if rows.is_contiguous:
            self._copy_rows(rows.parts[0].view(torch.uint8), blocks, memory, slots)
            self._mark()
            return
        for some_blocks, some_slots in self._chunks(rows, blocks, slots):
            staged = self._staged(rows, len(some_blocks))
            rows.copy_out(self._send(some_blocks), staged, self._numbers[: len(some_blocks)])
            self._mark()
            self._copy_rows(staged, range(len(some_slots)), memory, some_slots)

    def load(self, rows: BlockRows, memory: torch.Tensor, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """See `Copies.load`."""
        if rows.is_contiguous:
            self._copy_rows(memory, slots, rows.parts[0].view(torch.uint8), blocks)
            self._mark()
            return
        for some_slots, some_blocks in self._chunks(rows, slots, blocks):
            staged = self._staged(rows, len(some_blocks))
            self._copy_rows(memory, some_slots, staged, range(len(some_slots)))
            rows.copy_in(staged, self._numbers[: len(some_blocks)], self._send(some_blocks))
            self._mark()

    def wait(self) -> None:
        """See `Copies.wait`."""
        if self._stream is not None:
            self._stream.synchronize()

    def _chunks(
        self, rows: BlockRows, first: Sequence[int], second: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """As many of both at a time as the buffer holds; none of rows without bytes."""
        if rows.num_bytes:
            size = len(self._staging) // rows.num_bytes
            for start in range(0, len(first), size):
                yield first[start : start + size], second[start : start + size]

    def _staged(self, rows: BlockRows, count: int) -> torch.Tensor:
        """The first `count` rows of the buffer."""
        return self._staging[: count * rows.num_bytes].view(count, -1)

    def _send(self, numbers: Sequence[int]) -> torch.Tensor:
        (sent,) = self._inputs.send([np.array(numbers, dtype=np.int64)])
        return sent

    def _copy_rows(
        self, source: torch.Tensor, rows: Sequence[int], target: torch.Tensor, target_rows: Sequence[int]
    ) -> None:
        for start, target_start, count in runs(rows, target_rows):
            part = source[start : start + count]
            target[target_start : target_start + count].copy_(part, non_blocking=True)

    def _mark(self) -> None:
        if self._touched is not None:
            self._touched.record()


def runs(first: Sequence[int], second: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start in first, start in second, length) of each stretch in which both numbers count up by one."""
    begin = 0
    for end in range(1, len(first) + 1):
        if end < len(first) and first[end] - first[end - 1] == 1 == second[end] - second[end - 1]:
            continue
        yield first[begin], second[begin], end - begin
        begin = end


def staging_bytes(row_bytes: Sequence[int]) -> int:
    """Bytes of the buffer on the device: at least one row of any pool."""
    return max(STAGING_BYTES, *row_bytes) if row_bytes else 0


def make_copies(device: torch.device, rows: Sequence[BlockRows]) -> Copies:
    """The copies for `device`."""
    if device.type == "cpu":
        return DirectCopies()
    return StagedCopies(device, [each.num_bytes for each in rows if not each.is_contiguous])
