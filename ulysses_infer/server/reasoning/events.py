"""The interface of reasoning formats and parsers, and the events they emit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ulysses_infer.server.tool_calls.events import ToolEvent
from ulysses_infer.server.tool_calls.pieces import Piece, Tag


@dataclass(frozen=True)
class ReasoningDelta:
    """The next piece of the reasoning."""

    text: str


ReasoningEvent = ReasoningDelta | ToolEvent
"""Content may still have tool calls in a format of its own, unless the reasoning format includes them."""


class ReasoningParser(Protocol):
    """Splits one output while it streams. The joined result does not depend on how the text is cut."""

    def push(self, text: str) -> list[ReasoningEvent]:
        """Take the next piece of text; returns the new events, possibly none."""

    def finish(self) -> list[ReasoningEvent]:
        """The output is complete: returns the text held back."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends within reasoning."""


class ReasoningFormat(Protocol):
    """A format in which models write their reasoning."""

    @property
    def name(self) -> str:
        """The name in `server.reasoning_parser`."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Markup that may be special tokens of a tokenizer: text must then be decoded with them."""

    @property
    def history_key(self) -> str:
        """The key under which the chat template reads the reasoning of an earlier assistant message."""

    def parser(self, prompt: str) -> ReasoningParser:
        """A new parser, for one output. prompt: the text before it, which may have begun or ended the reasoning."""

    def prefix(self, prompt: str, tag: Tag) -> list[Piece]:
        """The grammar of what an output may have before its content. Empty if the prompt leaves no room for any."""
