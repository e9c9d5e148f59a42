"""Middleware that gives every HTTP request an id, metrics and an access log line."""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID_HEADER = b"x-request-id"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_LEFT = 499  # nginx's status for a client that left before the response
FAILED = 500


class HttpObserver:
    """ASGI middleware, outermost. It passes messages on and keeps none.

    The request's id is the client's `X-Request-Id` if that is 1 to 128 characters of [A-Za-z0-9._-], else a new one.
    Routes find it in `scope["state"]["request_id"]`, clients in the response's `X-Request-Id`. `count(method, route,
    status, seconds)` is called once per finished request, `log` with its fields.
    """

    def __init__(
        self,
        app: Application,
        count: Callable[[str, str, int, float], None],
        log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._app, self._count, self._log = app, count, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; errors of the application are raised again."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            self._report(scope, exchange)

    def _report(self, scope: Scope, exchange: _Exchange) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route, seconds = route_of(scope), time.monotonic() - exchange.started
        self._count(method, route, exchange.outcome, seconds)
        if self._log is not None:
            self._log(
                {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "request_id": exchange.request_id,
                    "method": method,
                    "route": route,
                    "status": exchange.outcome,
                    "seconds": round(seconds, 6),
                    "bytes": exchange.num_bytes,
                }
            )


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.started = time.monotonic()
        self.request_id = request_id_of(scope)
        self.num_bytes = 0
        self._status: int | None = None
        self._client_left = False
        self._receive, self._send = receive, send
        scope.setdefault("state", {})["request_id"] = self.request_id

    @property
    def outcome(self) -> int:
        """The response's status. An application that ended without one failed, unless the client had left."""
        if self._status is not None:
            return self._status
        return CLIENT_LEFT if self._client_left else FAILED

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._client_left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != REQUEST_ID_HEADER]
            message = {**message, "headers": [*headers, (REQUEST_ID_HEADER, self.request_id.encode())]}
        elif message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
        await self._send(message)


def request_id_of(scope: Scope) -> str:
    """The client's id if it is valid, else a new one."""
    for name, value in scope["headers"]:
        if name.lower() == REQUEST_ID_HEADER and REQUEST_ID.fullmatch(value):
            return bytes(value).decode()
    return uuid.uuid4().hex


def route_of(scope: Scope) -> str:
    """The template of the route, such as `/v1/models/{model}`; "other" if none matched."""
    return getattr(scope.get("route"), "path", "other")


def write_json_line(fields: dict[str, Any]) -> None:
    """Write one JSON object as a line of standard error."""
    sys.stderr.write(json.dumps(fields, separators=(",", ":")) + "\n")
    sys.stderr.flush()
