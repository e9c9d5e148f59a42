"""Rank 0 speaks, the others listen: step plans and results as short byte messages over the host-side group."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ulysses_infer.engine.failure import as_user_error
from ulysses_infer.parallel.groups import Groups

STEP, VALUE, ERROR, SHUTDOWN = range(4)
INLINE_BYTES = 4096  # one broadcast carries this much; longer messages need a second one
HEADER_BYTES = 9  # kind (1), length (8)
T = TypeVar("T")


class Channel:
    """Ordered broadcast from rank 0. With a single rank every message stays at home."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._buffer = torch.zeros(HEADER_BYTES + INLINE_BYTES, dtype=torch.uint8)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks."""
        return self._groups.is_first

    @property
    def _group(self) -> Any:
        return self._groups.control

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Rank 0: tell every other rank."""
        if self._group is None:
            return
        head = bytes([kind]) + len(payload).to_bytes(8, "little") + payload[:INLINE_BYTES]
        self._buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(self._buffer)
        if len(payload) > INLINE_BYTES:
            self._broadcast(torch.frombuffer(bytearray(payload[INLINE_BYTES:]), dtype=torch.uint8))

    def receive(self) -> tuple[int, bytes]:
        """Every other rank: wait for the next message."""
        self._broadcast(self._buffer)
        kind = int(self._buffer[0])
        length = int.from_bytes(bytes(self._buffer[1:HEADER_BYTES].tolist()), "little")
        inline = self._buffer[HEADER_BYTES : HEADER_BYTES + min(length, INLINE_BYTES)].numpy().tobytes()
        if length <= INLINE_BYTES:
            return kind, inline
        rest = torch.empty(length - INLINE_BYTES, dtype=torch.uint8)
        self._broadcast(rest)
        return kind, inline + rest.numpy().tobytes()

    def send_value(self, value: Any) -> None:
        """Rank 0: give every rank the same result."""
        if self._group is not None:
            self.send(VALUE, pickle.dumps(value))

    def send_error(self, error: Exception) -> None:
        """Rank 0: make every rank raise the same error."""
        if self._group is not None:
            self.send(ERROR, pickle.dumps(error))

    def agree(self, error: Exception | None) -> None:
        """Every rank reports how a phase went; all raise the error of the lowest rank that has one."""
        reports = self.gather(None if error is None else as_user_error(error))
        first = next((report for report in reports if report is not None), None)
        if first is not None:
            raise first from error

    def together(self, phase: Callable[[], T]) -> T:
        """Run a phase on every rank; if it fails on any, all raise its error, so that none waits for a lost one."""
        try:
            result = phase()
        except Exception as error:
            self.agree(error)
            raise
        self.agree(None)
        return result

    def smallest(self, number: int) -> int:
        """The least of every rank's `number`, on every rank."""
        if self._group is None:
            return number
        value = torch.tensor([number], dtype=torch.int64)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN, group=self._group)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def _broadcast(self, buffer: torch.Tensor) -> None:
        torch.distributed.broadcast(buffer, src=0, group=self._group)
