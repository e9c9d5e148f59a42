"""OpenAI's harmony format (gpt-oss): an output is a list of messages, each in a channel.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>

The analysis is reasoning, a message to a function is a tool call, anything else is content. Described in OpenAI's
"Harmony response format".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ulysses_infer.server.reasoning.events import ReasoningDelta, ReasoningEvent
from ulysses_infer.server.reasoning.states import StateParser
from ulysses_infer.server.tool_calls.events import ArgumentsDelta, CallStarted, ContentDelta
from ulysses_infer.server.tool_calls.pieces import Piece, Tag, some, text_piece, until
from ulysses_infer.server.tool_calls.streaming import call_id, num_shared

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")


@dataclass(frozen=True)
class Harmony:
    """The format of gpt-oss."""

    name: str = "openai_gptoss"
    tags: tuple[str, ...] = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
    history_key: str = "thinking"

    def parser(self, prompt: str) -> HarmonyParser:
        """A new parser, for one output."""
        return HarmonyParser()

    def prefix(self, prompt: str, tag: Tag) -> list[Piece]:
        """Optional analysis, then the header of the final message."""
        header = [*tag(CHANNEL), text_piece("analysis"), *tag(MESSAGE)]
        analysis = [*header, *until(tag, ENDS[0]), *tag(START), text_piece("assistant")]
        return [some([analysis], 0), *tag(CHANNEL), text_piece("final"), *tag(MESSAGE)]


class HarmonyParser(StateParser):
    """Reads one output, message by message. An unfinished header at its end is dropped."""

    def __init__(self) -> None:
        super().__init__(self._header)
        self._num_calls = 0
        self._emit: Callable[[str], ReasoningEvent] = ReasoningDelta

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends within analysis."""
        return self._state == self._body and self._emit is ReasoningDelta

    # -- states: True if there is more to do -------------------------------------------------------------------------

    def _header(self) -> bool:
        """Before `<|message|>`. Text that has no markup at all is content, as of a model that lost the format."""
        header, found, rest = self._text.partition(MESSAGE)
        if found:
            self._text = rest
            self._open(header)
            self._state = self._body
            return True
        if self._is_final and "<|" not in header and header.strip():
            self._events.append(ContentDelta(header))
        if self._is_final:
            self._text = ""
        return False

    def _body(self) -> bool:
        position, end = min(((self._text.find(end), end) for end in ENDS if end in self._text), default=(-1, ""))
        if position >= 0:
            self._take(position)
            self._text = self._text[len(end) :]
            self._state = self._header
            return True
        held = 0 if self._is_final else max(num_shared(self._text, end) for end in ENDS)
        self._take(len(self._text) - held)
        return False

    def _open(self, header: str) -> None:
        """Begin a message: what its text becomes."""
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient is not None:
            index = self._num_calls
            self._num_calls += 1
            self._events.append(CallStarted(index, call_id(), recipient[1]))
            self._emit = lambda text: ArgumentsDelta(index, text)
        else:
            self._emit = ReasoningDelta if channel is not None and channel[1] == "analysis" else ContentDelta

    def _take(self, length: int) -> None:
        taken, self._text = self._text[:length], self._text[length:]
        if taken:
            self._events.append(self._emit(taken))
