"""Rank 0 speaks, the others listen: step plans and results as short byte messages; and what all ranks agree on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ulysses_infer.errors import as_user_error
from ulysses_infer.parallel.groups import Groups

STEP, VALUE, ERROR, SHUTDOWN, CALL = range(5)
T = TypeVar("T")


class Channel:
    """Ordered broadcast from rank 0. With a single rank every message stays at home."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks."""
        return self._groups.is_first

    @property
    def _group(self) -> Any:
        return self._groups.control

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Rank 0: tell every other rank."""
        if self._groups.mailbox is not None:
            self._groups.mailbox.send(bytes([kind]) + payload)

    def receive(self) -> tuple[int, bytes]:
        """Every other rank: wait for the next message."""
        assert self._groups.mailbox is not None
        message = self._groups.mailbox.receive()
        return message[0], message[1:]

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
