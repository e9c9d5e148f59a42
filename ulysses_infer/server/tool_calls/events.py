"""The interface of tool-call formats and parsers, and the events they emit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Tools = Sequence[Mapping[str, Any]]
"""Tool definitions in OpenAI's shape: `{"type": "function", "function": {"name": …, "parameters": …}}`."""


@dataclass(frozen=True)
class ContentDelta:
    """Text outside calls."""

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
    """The next piece of a call's arguments; all pieces joined are a JSON object."""

    index: int
    text: str


ToolEvent = ContentDelta | CallStarted | ArgumentsDelta


class ToolCallParser(Protocol):
    """Finds tool calls in one output while it streams. The joined result does not depend on how the text is split."""

    def push(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text; returns the new events, possibly none."""

    def finish(self, is_cut: bool = False) -> list[ToolEvent]:
        """The output is complete: returns the text held back. Text that did not become a call is content.

        is_cut: it ended at the limit of its length, so the start of a call is not content.
        """


class ToolFormat(Protocol):
    """A format in which models write tool calls."""

    @property
    def name(self) -> str:
        """The name in `server.tool_call_parser`."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Markup that may be special tokens of a tokenizer: text must then be decoded with them."""

    @property
    def is_bare(self) -> bool:
        """Whether an output may start with a call without a tag."""

    def parser(self, tools: Tools) -> ToolCallParser:
        """A new parser, for one output. `tools`: those of the request."""
