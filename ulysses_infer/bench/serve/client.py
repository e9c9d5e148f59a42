"""A lean asyncio HTTP/1.1 client: persistent connections and no task switch per token."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from ulysses_infer.bench.serve.answer import StreamedAnswer, StreamMeter, body_message
from ulysses_infer.bench.serve.wire import EventReader, ResponseReader, WireError
from ulysses_infer.errors import ConfigError, RequestError

JSON_TYPE = "application/json"

_Response = tuple[ResponseReader, bytes]
"""A response and, unless that was streamed, its body."""


@dataclass(frozen=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    prefix: str = ""
    """Path before `/v1`."""
    tls: ssl.SSLContext | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 3600.0
    """Seconds after which a request counts as lost."""

    @classmethod
    def of(cls, base_url: str, api_key: str | None = None, ca_file: str | None = None, **more: Any) -> Server:
        """The server of a URL, with or without `/v1` at its end. Raises `ConfigError`."""
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"--base-url {base_url!r} is not a URL such as http://127.0.0.1:8000")
        tls = _tls_context(ca_file) if parts.scheme == "https" else None
        headers = dict(more.pop("headers", {}))
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, port or (443 if tls else 80), prefix, tls, headers, **more)

    @property
    def url(self) -> str:
        """What the server is called in messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole request as it goes over the wire."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {"Host": f"{host}:{self.port}", "Accept": "*/*", **self.headers}
        if body:
            headers |= {"Content-Type": JSON_TYPE, "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{method} {self.prefix}{path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ConfigError(f"--ca-file {ca_file!r} cannot be used: {error}; give certificates in PEM") from error


class _HttpConnection(asyncio.Protocol):
    """A connection, and the request that is on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_open = False
        self._reader = ResponseReader()
        self._events = EventReader()
        self._body: list[bytes] = []
        self._meter: StreamMeter | None = None
        self._ended: asyncio.Future[ResponseReader] | None = None

    def start(self, request: bytes, meter: StreamMeter | None) -> asyncio.Future[ResponseReader]:
        """Send a request. Events of a stream go to `meter`; the future has the response once it is complete."""
        assert self.transport is not None
        self._reader, self._events, self._body = ResponseReader(), EventReader(), []
        self._meter = meter
        self._ended = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._ended

    def body(self) -> bytes:
        """The body of a response that was not streamed."""
        return b"".join(self._body)

    def close(self) -> None:
        """Give the connection up."""
        self.is_open = False
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are not of that class
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Of asyncio: take apart what came; its moment is now."""
        now = time.perf_counter()
        ended = self._ended
        if ended is None or ended.done():
            self.close()  # an unsolicited response
            return
        reader = self._reader
        try:
            body = reader.feed(data)
        except WireError as error:
            ended.set_exception(error)
            return
        if body and self._meter is not None and reader.status == 200:
            for event in self._events.feed(body):
                self._meter.take(event, now)
        elif body:
            self._body.append(body)
        if reader.is_complete:
            ended.set_result(reader)

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio."""
        self.is_open = False
        if self._ended is None or self._ended.done():
            return
        try:
            self._reader.end()
            self._ended.set_result(self._reader)
        except WireError as broken:
            self._ended.set_exception(broken)

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of the response has come."""
        return self._reader.status == 0


class Client:
    """Requests to one server over connections that are kept and used again."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.num_connections = 0
        """Opened so far."""
        self._idle: list[_HttpConnection] = []

    async def stream(self, path: str, body: bytes, answer: StreamedAnswer) -> None:
        """POST and read the events of the answer into `answer`; failures are recorded there."""
        meter = StreamMeter(answer)
        request = self.server.request("POST", path, body)
        answer.sent = time.perf_counter()
        try:
            async with asyncio.timeout(self.server.timeout):
                response, text = await self._exchange(request, meter)
        except TimeoutError:
            meter.fail(f"no end within {self.server.timeout:g} s")
        except (OSError, WireError) as error:
            meter.fail(f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error))
        else:
            if response.status != 200:
                meter.fail(body_message(response.status, text))
            else:
                meter.end(time.perf_counter())
        if answer.ended == 0.0:
            answer.ended = time.perf_counter()

    async def call(self, method: str, path: str, content: Any = None) -> Any:
        """A plain request with JSON both ways. Raises `RequestError` if the server refuses, `OSError` if it is away."""
        body = b"" if content is None else json.dumps(content).encode()
        async with asyncio.timeout(self.server.timeout):
            response, text = await self._exchange(self.server.request(method, path, body), None)
        if response.status != 200:
            raise RequestError(body_message(response.status, text))
        is_json = response.headers.get("content-type", "").startswith(JSON_TYPE)
        return json.loads(text) if is_json else text.decode()

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: bytes, meter: StreamMeter | None) -> _Response:
        """Send on an idle connection or a new one. Cancelling this closes the connection.

        A kept connection may have been closed by the server as the request went out: then nothing came back and the
        request goes out once more on a new one, as RFC 9112 §9.3.1 has it.
        """
        while self._idle:
            exchange = self._idle.pop()
            if not exchange.is_open:
                continue
            try:
                return await self._run(exchange, request, meter)
            except WireError:
                if not exchange.is_untouched:
                    raise
        return await self._run(await self._connect(), request, meter)

    async def _run(self, exchange: _HttpConnection, request: bytes, meter: StreamMeter | None) -> _Response:
        try:
            response = await exchange.start(request, meter)
        except BaseException:
            exchange.close()
            raise
        body = exchange.body()
        if response.keeps_connection and exchange.is_open:
            self._idle.append(exchange)
        else:
            exchange.close()
        return response, body

    async def _connect(self) -> _HttpConnection:
        server = self.server
        self.num_connections += 1
        _, exchange = await asyncio.get_running_loop().create_connection(
            _HttpConnection, server.host, server.port, ssl=server.tls
        )
        return exchange
