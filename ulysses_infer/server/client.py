"""The HTTP process's client of the engine: sends requests, receives tokens, fails when the engine dies."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ulysses_infer.engine.load import outstanding_tokens
from ulysses_infer.errors import EngineDeadError, OverloadedError, ReplicaLostError, RequestError
from ulysses_infer.server.frames import FrameReader, encode_frame
from ulysses_infer.server.messages import (
    Abort,
    AdminCall,
    Dead,
    Draining,
    EngineState,
    FromEngine,
    Goodbye,
    NewToken,
    Ready,
    Refused,
    Reply,
    Stepped,
    StepReport,
    Submit,
    ToEngine,
)

STARTING, READY, DRAINING, DEAD = "starting", "ready", "draining", "dead"
DEGRADED = "degraded"  # of several replicas: ready, but some are dead
READ_BYTES = 1 << 18


@dataclass
class RequestRecord:
    """One request's life as clients see it: times in seconds on the monotonic clock, None until reached."""

    request_id: str
    arrival_time: float
    num_prompt_tokens: int
    num_sequences: int
    num_cached_tokens: int = 0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finish_time: float | None = None
    num_output_tokens: int = 0
    """Of all its sequences."""
    finish_reason: str | None = None
    """Of the sequence that ended last; "abort" if the client disconnected, "error" if the engine failed."""


class Observer(Protocol):
    """Receives events for metrics, dashboard and log. Called on the event loop; must be quick."""

    def on_ready(self, info: Ready) -> None:
        """The engine is ready."""

    def on_step(self, state: EngineState, step: StepReport | None) -> None:
        """A step ran, or the state changed without one."""

    def on_first_token(self, record: RequestRecord) -> None:
        """A request's prompt is computed and its first token has arrived."""

    def on_tokens(self, record: RequestRecord, seconds: float) -> None:
        """A sequence of a request got another token, `seconds` after the previous one."""

    def on_finish(self, record: RequestRecord) -> None:
        """A request ended, for any reason. Called once for every request that the engine accepted."""

    def on_draining(self, deadline: float) -> None:
        """The server accepts no more requests; running ones have until `deadline`."""

    def on_dead(self, reason: str) -> None:
        """The engine is dead."""


@dataclass(eq=False)
class _Stream:
    """Messages of one request that were not consumed yet."""

    record: RequestRecord
    unfinished: set[int]
    pending: list[NewToken] = field(default_factory=list)
    error: Exception | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    last_times: dict[int, float] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        self.error = error
        self.arrived.set()


class EngineClient:
    """Communicates with the engine over one connected socket. All methods run in the event loop's thread."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, observer: Observer, stream_interval: int = 1
    ) -> None:
        self._reader, self._writer, self._observer = reader, writer, observer
        self._stream_interval = stream_interval
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self.status = STARTING
        """starting | ready | draining | dead"""
        self.info: Ready | None = None
        """What was loaded; None while starting."""
        self.state: EngineState | None = None
        """The engine's load, as last reported."""
        self.death = ""
        """Why the engine is dead, in one line."""
        self.death_expected = False
        self.drain_deadline: float | None = None
        self.settled = asyncio.Event()
        """Set once the engine is ready, or died before that."""
        self.ended = asyncio.Event()
        """Set once the engine is dead, or has drained and may exit."""
        self.on_drained: Callable[[], None] = self.leave
        """Called when the engine drains and no request waits for it."""

    @property
    def dead_replicas(self) -> dict[int, str]:
        """Why replicas are dead while others serve; one engine has no others. See `Router.dead_replicas`."""
        return {}

    @property
    def num_requests(self) -> int:
        """Requests in progress."""
        return len(self._streams)

    def outstanding_tokens(self) -> int:
        """The replica's load; see `engine.load`."""
        return outstanding_tokens(
            (len(stream.unfinished), stream.record.num_prompt_tokens if stream.record.first_token_time is None else 0)
            for stream in self._streams.values()
        )

    # -- used by routes ------------------------------------------------------------------------------------------

    async def generate(self, request: Submit, num_sequences: int = 1) -> AsyncIterator[list[NewToken]]:
        """Complete a prompt: yields the new tokens of all its sequences as they arrive, until every sequence has ended.

        After the first token it waits for `stream_interval` tokens of each sequence. Leaving the iterator early, by
        `aclose` or cancellation, aborts the request. Raises `RequestError` if the engine refuses it, `OverloadedError`
        if its queue is full or it drains, `EngineDeadError` if the engine is dead, RuntimeError for a bug in the
        engine.
        """
        self._check_accepting()
        record = RequestRecord(request.request_id, time.monotonic(), len(request.token_ids), num_sequences)
        stream = _Stream(record, set(range(num_sequences)))
        self._streams[request.request_id] = stream
        self._send(request)
        try:
            while stream.unfinished or stream.pending:
                await stream.arrived.wait()
                stream.arrived.clear()
                if stream.error is not None and not stream.pending:
                    raise stream.error
                if stream.pending:
                    pending, stream.pending = stream.pending, []
                    if stream.error is not None:
                        stream.arrived.set()
                    yield pending
        finally:
            self._close(stream)

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """Run an administrative command. Raises `RequestError` with the engine's message, or `EngineDeadError`."""
        if self.status == DEAD:
            raise EngineDeadError(self.death)
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        self._send(AdminCall(number, name, arguments))
        try:
            return await future
        finally:
            self._calls.pop(number, None)

    def _check_accepting(self) -> None:
        if self.status == DEAD:
            raise EngineDeadError(self.death)
        if self.status == STARTING:
            raise OverloadedError("the engine is still loading the model; try again when /ready returns 200")
        if self.status == DRAINING:
            raise OverloadedError("the server is shutting down and takes no new requests; try another one")

    def _close(self, stream: _Stream) -> None:
        """The request has finished, or its client is gone."""
        record = stream.record
        del self._streams[record.request_id]
        if stream.unfinished and stream.error is None:
            self._send(Abort(record.request_id))
            record.finish_reason = "abort"
        elif stream.error is not None:
            record.finish_reason = "error"
        record.finish_time = time.monotonic()
        was_refused = isinstance(stream.error, RequestError | OverloadedError) and record.first_token_time is None
        if not was_refused:
            self._observer.on_finish(record)
        if self.is_drained:
            self.on_drained()

    # -- messages from the engine --------------------------------------------------------------------------------

    def die(self, reason: str) -> None:
        """Treat the engine as dead, regardless of the state of its socket."""
        self._die(Dead(reason))

    async def listen(self) -> None:
        """Receive messages until the engine closes its end of the socket. Runs as one task."""
        frames: FrameReader[FromEngine] = FrameReader(FromEngine)
        try:
            while data := await self._reader.read(READ_BYTES):
                for message in frames.feed(data):
                    self._take(message)
        except ConnectionError:
            pass  # the engine's process is gone
        self._die(Dead("the engine's process ended"))

    def _take(self, message: FromEngine) -> None:
        match message:
            case Stepped():
                self._take_step(message)
            case Ready():
                self.info, self.state, self.status = message, message.state, READY
                self._observer.on_ready(message)
                self.settled.set()
            case Refused():
                self._refuse(message)
            case Reply():
                self._answer(message)
            case Draining():
                self.status, self.drain_deadline = DRAINING, message.deadline
                self._observer.on_draining(message.deadline)
                if self.is_drained:
                    self.on_drained()
            case Dead():
                self._die(message)

    def _take_step(self, message: Stepped) -> None:
        self.state = message.state
        self._observer.on_step(message.state, message.step)
        now = time.monotonic()
        for token in message.tokens:
            stream = self._streams.get(token.request_id)
            if stream is not None:
                self._take_token(stream, token, now)

    def _take_token(self, stream: _Stream, token: NewToken, now: float) -> None:
        record = stream.record
        if token.start is not None:
            record.num_cached_tokens = token.start.num_cached_tokens
            record.scheduled_time = token.start.scheduled_time
        if token.token_id >= 0:
            self._time_token(stream, token.index, now)
        if token.finish_reason is not None:
            stream.unfinished.discard(token.index)
            record.finish_reason = token.finish_reason
        stream.pending.append(token)
        is_news = token.start is not None or token.finish_reason is not None
        if is_news or len(stream.pending) >= self._stream_interval * len(stream.unfinished):
            stream.arrived.set()

    def _time_token(self, stream: _Stream, index: int, now: float) -> None:
        record = stream.record
        record.num_output_tokens += 1
        record.last_token_time = now
        if record.first_token_time is None:
            record.first_token_time = now
            self._observer.on_first_token(record)
        elif index in stream.last_times:
            self._observer.on_tokens(record, now - stream.last_times[index])
        stream.last_times[index] = now

    def _refuse(self, message: Refused) -> None:
        stream = self._streams.get(message.request_id)
        if stream is not None:
            kinds = {"invalid": RequestError, "overloaded": OverloadedError, "lost": ReplicaLostError}
            stream.fail(kinds.get(message.kind, RuntimeError)(message.message))

    def _answer(self, message: Reply) -> None:
        future = self._calls.get(message.number)
        if future is None or future.done():
            return
        if message.error is None:
            future.set_result(message.value)
        else:
            future.set_exception(RequestError(message.error))

    def _die(self, message: Dead) -> None:
        """Fail every waiting request; the first reason counts."""
        if self.status == DEAD:
            return
        self.status, self.death, self.death_expected = DEAD, message.reason, message.expected
        self._observer.on_dead(message.reason)
        for stream in self._streams.values():
            stream.fail(EngineDeadError(message.reason))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(message.reason))
        self.settled.set()
        self.ended.set()

    @property
    def is_drained(self) -> bool:
        """Whether the engine drains and every request has been answered."""
        return self.status == DRAINING and not self._streams

    def leave(self) -> None:
        """Allows the drained engine to exit."""
        if not self.ended.is_set():
            self._send(Goodbye())
            self.ended.set()

    def _send(self, message: ToEngine) -> None:
        if self.status != DEAD:
            self._writer.write(encode_frame(message))
