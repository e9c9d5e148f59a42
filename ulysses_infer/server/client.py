"""The HTTP process's client of the engine: sends requests, receives tokens, fails when the engine dies."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ulysses_infer.errors import EngineDeadError, OverloadedError, RequestError
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
READ_BYTES = 1 << 18


@dataclass
class RequestRecord:
    """One request's life as clients see it: moments in seconds on the monotonic clock, None if not reached."""

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
    """Of all sequences together."""
    finish_reason: str | None = None
    """That of the sequence that ended last; "abort" when the client left, "error" when the engine failed."""


class Observer(Protocol):
    """Who wants to know what happens: metrics, the dashboard, the log. Called on the event loop; must be quick."""

    def on_ready(self, info: Ready) -> None:
        """The engine is up."""

    def on_step(self, state: EngineState, step: StepReport | None) -> None:
        """A step ran, or the state changed without one."""

    def on_first_token(self, record: RequestRecord) -> None:
        """A request's prompt is computed and its first token is here."""

    def on_tokens(self, record: RequestRecord, seconds: float) -> None:
        """A sequence of a request got another token, `seconds` after the one before."""

    def on_finish(self, record: RequestRecord) -> None:
        """A request ended, however it did. Comes once for every request that the engine took."""

    def on_draining(self, deadline: float) -> None:
        """The server takes no more requests; those that run have until `deadline`."""

    def on_dead(self, reason: str) -> None:
        """The engine is gone."""


@dataclass(eq=False)
class _Stream:
    """What has come for one request and was not taken yet."""

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
    """Speaks to the engine over one connected socket. Every method belongs to the event loop's thread."""

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
        """How full the engine is, as last heard."""
        self.death = ""
        """Why the engine is dead, in one line."""
        self.death_expected = False
        self.drain_deadline: float | None = None
        self.settled = asyncio.Event()
        """Set once the engine is ready, or dead before it ever was."""
        self.ended = asyncio.Event()
        """Set once the engine is dead, or has drained and was told that it may end."""
        self.on_drained: Callable[[], None] = self.leave
        """Called whenever the engine drains and nobody waits for it."""

    @property
    def num_requests(self) -> int:
        """Requests that are being answered."""
        return len(self._streams)

    def outstanding_tokens(self, sequence_tokens: int) -> int:
        """Work that is left, in tokens: prompts that have no output yet, and `sequence_tokens` a sequence that has."""
        return sum(
            sequence_tokens * len(stream.unfinished)
            + (stream.record.num_prompt_tokens if stream.record.first_token_time is None else 0)
            for stream in self._streams.values()
        )

    # -- what routes use -----------------------------------------------------------------------------------------

    async def generate(self, request: Submit, num_sequences: int = 1) -> AsyncIterator[list[NewToken]]:
        """Complete a prompt: yields the tokens that came since the last time, of all its sequences, until all end.

        After the first token it waits for `stream_interval` of each sequence.
        Leaving the iterator early, by `aclose` or cancellation, aborts the request. Raises `RequestError` if the
        engine refuses it, `OverloadedError` if its queue is full or it drains, `EngineDeadError` if it is gone,
        RuntimeError for a bug of the engine's.
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
        """An administrative command. Raises `RequestError` with the engine's one line, `EngineDeadError`."""
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
            raise OverloadedError("the engine is still loading the model; try again when /ready says 200")
        if self.status == DRAINING:
            raise OverloadedError("the server is shutting down and takes no new requests; try another one")

    def _close(self, stream: _Stream) -> None:
        """Whoever asked is gone, or has everything."""
        record = stream.record
        del self._streams[record.request_id]
        if stream.unfinished and stream.error is None:
            self._send(Abort(record.request_id))
            record.finish_reason = "abort"
        elif stream.error is not None:
            record.finish_reason = "error"
        record.finish_time = time.monotonic()
        if not isinstance(stream.error, RequestError | OverloadedError):
            self._observer.on_finish(record)
        if self.is_drained:
            self.on_drained()

    # -- what the engine says ------------------------------------------------------------------------------------

    def die(self, reason: str) -> None:
        """The engine is known to be gone or hung, whatever its socket says."""
        self._die(Dead(reason))

    async def listen(self) -> None:
        """Take the engine's messages until its end of the socket is closed. Runs as one task."""
        frames: FrameReader[FromEngine] = FrameReader(FromEngine)
        try:
            while data := await self._reader.read(READ_BYTES):
                for message in frames.feed(data):
                    self._take(message)
        except ConnectionError:
            pass  # the same as its end: the engine's process is gone
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
            kinds = {"invalid": RequestError, "overloaded": OverloadedError}
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
        """Everyone who waits is told; the first reason counts."""
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
        """Whether the engine drains and everyone is answered."""
        return self.status == DRAINING and not self._streams

    def leave(self) -> None:
        """Tell the drained engine that it may end."""
        if not self.ended.is_set():
            self._send(Goodbye())
            self.ended.set()

    def _send(self, message: ToEngine) -> None:
        if self.status != DEAD:
            self._writer.write(encode_frame(message))
