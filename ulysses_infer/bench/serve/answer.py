"""The answer to one request, with the time of each of its parts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

DONE = b"[DONE]"
FAILED_ENDINGS = ("abort", "error")
MAX_ERROR_LENGTH = 300


@dataclass
class StreamedAnswer:
    """One request as seen by the client. Times are seconds of `time.perf_counter`."""

    scheduled: float = 0.0
    due: float = 0.0
    """The earliest time it could be sent: later than `scheduled` if the concurrency limit delayed it."""
    sent: float = 0.0
    first_token: float | None = None
    ended: float = 0.0
    """When the last token or the end of the stream arrived."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between successive chunks with tokens."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    """Why it failed; None if it succeeded."""

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return (self.first_token or self.ended) - self.sent

    @property
    def e2el(self) -> float:
        """Seconds from sending to the last token."""
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for a single token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def lateness(self) -> float:
        """Seconds by which the client sent it late."""
        return self.sent - self.due


class StreamMeter:
    """Reads the events of one streamed response into a `StreamedAnswer`.

    A stream without `finish_reason` or without `[DONE]` has failed.
    """

    def __init__(self, answer: StreamedAnswer) -> None:
        self.answer = answer
        self._last = 0.0
        self._num_pieces = 0
        self._is_done = False

    def take(self, data: bytes, now: float) -> None:
        """Process one event."""
        if data == DONE:
            self._is_done = True
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            self.fail(f"an event is not JSON: {data[:80]!r}")
            return
        error = chunk.get("error")
        if error is not None:
            self.fail(error_message(error))
        usage = chunk.get("usage")
        if usage is not None:
            self._take_usage(usage)
        for choice in chunk.get("choices") or ():
            self._take_choice(choice, now)

    def end(self, now: float) -> None:
        """Process the end of the body."""
        answer = self.answer
        if answer.output_tokens == 0:
            answer.output_tokens = self._num_pieces  # the server does not report usage
        if answer.ended == 0.0:
            answer.ended = now
        if answer.finish_reason in FAILED_ENDINGS:
            self.fail(f"the server ended it: finish_reason {answer.finish_reason!r}")
        if answer.finish_reason is None:
            self.fail("the stream ended without a finish_reason")
        if not self._is_done:
            self.fail("the stream ended without [DONE]")

    def fail(self, message: str) -> None:
        """Record that the request failed; only the first reason is kept."""
        if self.answer.error is None:
            self.answer.error = message[:MAX_ERROR_LENGTH]

    def _take_choice(self, choice: dict[str, Any], now: float) -> None:
        answer = self.answer
        finish_reason = choice.get("finish_reason")
        if has_token(choice, finish_reason):
            if answer.first_token is None:
                answer.first_token = now
            else:
                answer.gaps.append(now - self._last)
            self._last = now
            self._num_pieces += 1
        answer.ended = now
        if finish_reason is not None:
            answer.finish_reason = finish_reason

    def _take_usage(self, usage: dict[str, Any]) -> None:
        answer = self.answer
        answer.prompt_tokens = usage.get("prompt_tokens") or 0
        answer.output_tokens = usage.get("completion_tokens") or 0
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def has_token(choice: dict[str, Any], finish_reason: str | None) -> bool:
    """Whether a chunk's choice contains a token and does not only open or close a message.

    A token may have no text (part of a character), so chunks without text count unless they open or close a message.
    """
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or finish_reason is None
    texts = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
    return any(delta.get(key) for key in texts) or (finish_reason is None and "role" not in delta)


def error_message(error: Any) -> str:
    """The message of an error, in OpenAI's shape or any other."""
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:MAX_ERROR_LENGTH]


def body_message(status: int, body: bytes) -> str:
    """The error message of a response whose status is not 200."""
    try:
        content = json.loads(body)
    except ValueError:
        content = body.decode("utf-8", "replace")
    if isinstance(content, dict):
        content = content.get("error", content.get("detail", content))
    return f"HTTP {status}: {error_message(content)}"
