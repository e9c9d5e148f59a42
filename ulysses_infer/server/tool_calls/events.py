"""The interface of tool-call formats and parsers, and the events they emit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Tools = Sequence[Mapping[str, Any]]
"""Tool definitions in OpenAI's shape: `{"type": "function", "function": {"name": …, "parameters": …}}`."""


@dataclass(frozen=True)
class ContentDelta:
    """Plain text for the reader."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """The model calls the tool `name`. Its arguments follow as `ArgumentsDelta`s of the same index."""

    index: int
    """0 for the first call of an output, then 1, 2, …"""
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """The next piece of a call's arguments: joined, they are the text of a JSON object."""

    index: int
    text: str


ToolEvent = ContentDelta | CallStarted | ArgumentsDelta


class ToolCallParser(Protocol):
    """Finds tool calls in one output while it streams. How the text is cut makes no difference to the joined result."""

    def push(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text; returns what became certain, which may be nothing."""

    def finish(self) -> list[ToolEvent]:
        """The output is complete: returns what was held back. Text that never became a call is content."""


class ToolFormat(Protocol):
    """One way in which models write tool calls."""

    @property
    def name(self) -> str:
        """As `server.tool_call_parser` names it."""

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the markup is special tokens, so that text must be made with `skip_special_tokens=False`."""

    def parser(self, tools: Tools) -> ToolCallParser:
        """A fresh parser, for one output. `tools`: those of the request."""
