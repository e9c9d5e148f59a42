"""Responses that are kept for later requests, within a limit of memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.responses.items import Item

_encode = msgspec.json.Encoder().encode


@dataclass(eq=False)
class StoredResponse:
    """A response with the conversation it belongs to."""

    response: dict[str, Any]
    earlier: list[Item]
    """Items of the responses before it."""
    input: list[Item]
    task: asyncio.Task[None] | None = None
    """Runs it, if it is a background response."""
    events: list[bytes] = field(default_factory=list)
    """The events so far, if it is a background response that streams."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_bytes: int = 0

    @property
    def id(self) -> str:
        """The response's id."""
        name: str = self.response["id"]
        return name

    @property
    def is_running(self) -> bool:
        """Whether a background task still computes it."""
        return self.task is not None and not self.task.done()

    @property
    def conversation(self) -> list[Item]:
        """All items up to and including this response."""
        return [*self.earlier, *self.input, *self.response["output"]]

    def add_events(self, events: list[bytes]) -> None:
        """Add events, and wake those that follow."""
        self.events += events
        self.notify()

    def notify(self) -> None:
        """Wake those that follow the response."""
        self.changed.set()
        self.changed = asyncio.Event()

    async def follow(self, start: int = 0) -> AsyncGenerator[bytes]:
        """The events from number `start` on, until the response has ended."""
        while True:
            changed = self.changed
            while start < len(self.events):
                yield self.events[start]
                start += 1
            if not self.is_running:
                return
            await changed.wait()


class ResponseStore:
    """Responses by id. The least recently used are forgotten when all take more than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, stored: StoredResponse) -> None:
        """Keep a response; running ones are never forgotten."""
        self._stored[stored.id] = stored
        self.settle(stored)

    def settle(self, stored: StoredResponse) -> None:
        """Count the memory of a response that is kept; make room for it."""
        if stored.id not in self._stored:
            return
        size = len(_encode([*stored.earlier, *stored.input, stored.response])) + sum(map(len, stored.events))
        self._num_bytes += size - stored.num_bytes
        stored.num_bytes = size
        for name in list(self._stored):
            if self._num_bytes <= self.max_bytes:
                break
            if not self._stored[name].is_running:
                self._forget(name)

    def get(self, response_id: str) -> StoredResponse:
        """A response. Raises `ApiError` 404 if it is not kept."""
        stored = self._stored.get(response_id)
        if stored is None:
            message = f"there is no response {response_id[:200]!r}; it was not stored, or has been forgotten"
            raise ApiError(404, message, param="response_id", code="response_not_found")
        self._stored.move_to_end(response_id)
        return stored

    def delete(self, response_id: str) -> None:
        """Forget a response, and end it if it runs. Raises `ApiError` 404."""
        stored = self.get(response_id)
        if stored.task is not None:
            stored.task.cancel()
        self._forget(response_id)

    def _forget(self, response_id: str) -> None:
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._num_bytes -= stored.num_bytes
