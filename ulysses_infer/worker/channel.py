"""Messages from rank 0 to the other ranks (step plans, calls, results), and agreement among all ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ulysses_infer.errors import as_user_error
from ulysses_infer.parallel.groups import ProcessGroups

STEP, VALUE, ERROR, SHUTDOWN, CALL, DRAFT = range(6)
T = TypeVar("T")


class Channel:
    """Ordered broadcast from rank 0. With a single rank nothing is sent."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which sends."""
        return self._groups.is_first

    @property
    def _control_group(self) -> Any:
        return self._groups.control

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Rank 0: send a message to every other rank."""
        if self._groups.mailbox is not None:
            self._groups.mailbox.send(bytes([kind]) + payload)

    def receive(self) -> tuple[int, bytes]:
        """Every other rank: wait for the next message; returns its kind and payload."""
        assert self._groups.mailbox is not None
        message = self._groups.mailbox.receive()
        return message[0], message[1:]

    def send_value(self, value: Any) -> None:
        """Rank 0: give every other rank a result."""
        if self._control_group is not None:
            self.send(VALUE, pickle.dumps(value))

    def send_error(self, error: Exception) -> None:
        """Rank 0: have every other rank raise an error."""
        if self._control_group is not None:
            self.send(ERROR, pickle.dumps(error))

    def agree(self, error: Exception | None) -> None:
        """Every rank passes its error or None; all raise the error of the lowest rank that has one. Collective."""
        reports = self.gather(None if error is None else as_user_error(error))
        first = next((report for report in reports if report is not None), None)
        if first is not None:
            raise first from error

    def together(self, phase: Callable[[], T]) -> T:
        """Run a phase on every rank. If it fails on one, all raise its error, so that none waits for a failed rank."""
        try:
            result = phase()
        except Exception as error:
            self.agree(error)
            raise
        self.agree(None)
        return result

    def smallest(self, number: int) -> int:
        """The minimum of every rank's `number`, on every rank. Collective."""
        if self._control_group is None:
            return number
        value = torch.tensor([number], dtype=torch.int64)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN, group=self._control_group)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on every rank. Collective."""
        if self._control_group is None:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size(self._control_group)
        torch.distributed.all_gather_object(values, value, group=self._control_group)
        return values
