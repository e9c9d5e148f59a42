"""An engine that computes nothing: it speaks `server/messages.py` over a socket pair and does what its script says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.tiny import EOS, VOCABULARY, encode
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.frames import FrameReader, encode_frame
from ulysses_infer.server.messages import (
    Abort,
    AdminCall,
    Dead,
    Draining,
    EngineState,
    Goodbye,
    NewToken,
    Ready,
    Refused,
    Reply,
    RequestStart,
    Stepped,
    StepReport,
    Submit,
    ToEngine,
)
from ulysses_infer.text.detokenizer import Detokenizer, TokenDecoder

MAX_MODEL_LEN = 128
STATE = EngineState(0, 0, 0.0, 0, 0, 0, {"name": "threshold", "threshold_tokens": 256})
READY = Ready("tiny", MAX_MODEL_LEN, len(VOCABULARY), [EOS], [(2, 1), (1, 2)], 64, 4, [1000, 1000], STATE)


@dataclass
class Script:
    """How requests are answered. `text`: the output, by the request and the sequence's index."""

    text: Callable[[Submit, int], str] = lambda submit, index: "hello world"
    seconds: float = 0.0
    """Before each token."""
    refusal: tuple[str, str] | None = None
    """(message, kind)"""
    num_tokens: int | None = None
    """After this number of tokens of a request it stalls, or does `then`."""
    then: str = "stall"
    """stall, die, error, abort"""
    num_cached_tokens: int = 0


@dataclass
class FakeEngine:
    """The engine's end of the socket pair. Tests change `script` and read the rest."""

    decoder: TokenDecoder | None
    script: Script = field(default_factory=Script)
    submits: list[Submit] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    calls: list[AdminCall] = field(default_factory=list)
    said_goodbye: bool = False
    replies: dict[str, Any] = field(default_factory=dict)
    """By command; an exception's text becomes the error."""

    def __post_init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._send: Callable[[Any], None] = lambda message: None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, connection: socket.socket, is_ready: bool = True) -> None:
        reader, self._writer = await asyncio.open_connection(sock=connection)
        self._listening = asyncio.create_task(self._listen(reader))
        if is_ready:
            self.send(READY)

    def send(self, message: Any) -> None:
        if self._writer is not None:
            self._writer.write(encode_frame(message))

    def die(self, reason: str = "rank 1 was killed") -> None:
        self.send(Dead(reason))

    def hang_up(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def drain(self) -> None:
        self.send(Draining(0.0))

    @property
    def running(self) -> list[str]:
        """Ids of requests that have not ended."""
        return [name for name, task in self._tasks.items() if not task.done()]

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        frames: FrameReader[ToEngine] = FrameReader(ToEngine)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                for message in frames.feed(data):
                    self._take(message)

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self.submits.append(message)
                self._submit(message, self.script)
            case Abort():
                self.aborts.append(message.request_id)
                task = self._tasks.get(message.request_id)
                if task is not None:
                    task.cancel()
            case AdminCall():
                self.calls.append(message)
                self.send(self._reply(message))
            case Goodbye():
                self.said_goodbye = True

    def _reply(self, call: AdminCall) -> Reply:
        value = self.replies.get(call.name, {})
        return Reply(call.number, error=str(value)) if isinstance(value, Exception) else Reply(call.number, value)

    def _submit(self, submit: Submit, script: Script) -> None:
        if script.refusal is not None:
            self.send(Refused(submit.request_id, *script.refusal))
            return
        if len(submit.token_ids) >= MAX_MODEL_LEN:
            self.send(Refused(submit.request_id, f"the prompt has {len(submit.token_ids)} tokens; shorten it"))
            return
        self._tasks[submit.request_id] = asyncio.create_task(self._complete(submit, script))

    async def _complete(self, submit: Submit, script: Script) -> None:
        params = SamplingParams.from_mapping(submit.params)
        sequences = [_Sequence(self.decoder, submit, params, script, index) for index in range(params.n)]
        count = 0
        while any(not sequence.is_finished for sequence in sequences):
            if script.num_tokens is not None and count >= script.num_tokens:
                await self._interrupt(submit, script, sequences)
                return
            await asyncio.sleep(script.seconds)
            tokens = [sequence.next() for sequence in sequences if not sequence.is_finished]
            step = StepReport(count, 0.0, 0.001, (2, 1), len(tokens), len(tokens), {})
            self.send(Stepped(STATE, step, tokens))
            count += 1

    async def _interrupt(self, submit: Submit, script: Script, sequences: list[_Sequence]) -> None:
        if script.then == "die":
            self.die()
        elif script.then in ("error", "abort"):
            ends = [NewToken(submit.request_id, sequence.index, -1, script.then) for sequence in sequences]
            self.send(Stepped(STATE, None, ends))
        else:
            await asyncio.Event().wait()


class _Sequence:
    """One output: the tokens of its text, then end-of-sequence; stop strings end it as they do in the real engine."""

    def __init__(
        self, decoder: TokenDecoder | None, submit: Submit, params: SamplingParams, script: Script, index: int
    ) -> None:
        self.index, self.is_finished = index, False
        self._submit, self._params, self._script = submit, params, script
        self._tokens = [*encode(script.text(submit, index)), EOS]
        self._detokenizer = Detokenizer(decoder, params, submit.token_ids)
        self._count = 0
        self._most = min(params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(submit.token_ids))

    def next(self) -> NewToken:
        token_id = self._tokens[min(self._count, len(self._tokens) - 1)]
        token = NewToken(self._submit.request_id, self.index, token_id)
        self._count += 1
        self._end(token)
        self.is_finished = token.finish_reason is not None
        if self._params.logprobs is not None:
            token.logprobs = scores(token_id, self._params.logprobs)
            # The later a token is asked for, the likelier it is, and the more so after long prompts.
            weight = len(self._submit.token_ids) / 10
            wanted = self._params.logprob_token_ids or ()
            token.logprobs += [(named, index * weight - 9, 9) for index, named in enumerate(wanted)]
        if self._count == 1:
            token.start = RequestStart(self._script.num_cached_tokens, 0.0, self._prompt_scores(), self._pooled())
        return token

    def _end(self, token: NewToken) -> None:
        token_id = token.token_id
        if token_id in (self._params.stop_token_ids or ()):
            token.finish_reason, token.stop_reason = "stop", token_id
        elif token_id == EOS and not self._params.ignore_eos:
            token.finish_reason = "stop"
        elif self._count >= self._most:
            token.finish_reason = "length"
        if token.finish_reason != "stop" or self._params.include_stop_str_in_output:
            self._detokenizer.append([token_id])
        if self._detokenizer.stop_reason is not None:
            token.finish_reason, token.stop_reason = "stop", self._detokenizer.stop_reason

    def _pooled(self) -> list[float] | None:
        """The number of tokens, the first token and the last."""
        ids = self._submit.token_ids
        return None if self._params.pooling is None else [float(len(ids)), float(ids[0]), float(ids[-1]), 0.0]

    def _prompt_scores(self) -> list[list[tuple[int, float, int]] | None] | None:
        count = self._params.prompt_logprobs
        if count is None:
            return None
        return [None, *(scores(token, count) for token in self._submit.token_ids[1:])]


def scores(token_id: int, count: int) -> list[tuple[int, float, int]]:
    """The chosen token is the second likeliest; the likeliest ones are those with the lowest ids after the specials."""
    others = [token for token in range(3, 3 + count + 1) if token != token_id][: max(count - 1, 0)]
    ranks = [rank for rank in range(1, count + 2) if rank != 2]
    listed = [(token, -0.5 - rank, rank) for token, rank in zip(others, ranks, strict=False)]
    return [(token_id, -2.5, 2), *listed]
