"""Tools of a chat request: the constraint on the output, and the parser that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ulysses_infer.sampling_params import StructuredOutputs
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.protocol.chat import ChatRequest
from ulysses_infer.server.tool_calls import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    ToolCallParser,
    ToolFormat,
    check_tool_choice,
    check_tools,
    constrained_format,
    tool_choice_constraint,
)


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request."""

    tools: Sequence[Mapping[str, Any]]
    format: ToolFormat | None
    """The tool-call format; None: outputs are not parsed for calls."""
    constraint: StructuredOutputs | None
    """The constraint that forces the calls that the request demands."""
    is_named: bool = False
    """Whether the request names the function to call."""
    is_parallel: bool = True
    """Whether more than one call is allowed."""

    def reader(self) -> CallReader | None:
        """A reader for one output."""
        return None if self.format is None else CallReader(self.format.parser(self.tools), self.is_parallel)


def tool_use(context: AppContext, body: ChatRequest) -> ToolUse:
    """How a request uses tools. Raises `RequestError`, `ApiError`."""
    tools = body.tools or []
    check_tools(tools)
    choice = body.tool_choice if body.tool_choice is not None else ("auto" if tools else "none")
    check_tool_choice(choice, tools)
    if not tools or choice == "none":
        return ToolUse(tools, None, None)
    is_parallel = body.parallel_tool_calls is not False
    if choice == "auto":
        return ToolUse(tools, context.tool_format, None, is_parallel=is_parallel)
    constraint = tool_choice_constraint(tools, choice, is_parallel)
    return ToolUse(tools, constrained_format(choice), constraint, isinstance(choice, Mapping), is_parallel)


def check_format(body: ChatRequest, use: ToolUse, wanted: Mapping[str, Any] | None) -> None:
    """Raises `ApiError` if the output must match another constraint, which would rule out tool calls."""
    if wanted is not None and use.format is not None:
        message = (
            "the output cannot both match a format and call tools; leave out response_format "
            'or structured_outputs, or set tool_choice to "none"'
        )
        raise ApiError(400, message, param="response_format" if body.response_format else "structured_outputs")


class CallReader:
    """Parses the text of one output into content and tool calls, in OpenAI's shapes."""

    def __init__(self, parser: ToolCallParser, is_parallel: bool) -> None:
        self._parser, self._is_parallel = parser, is_parallel
        self.has_calls = False
        """Whether the output calls a tool."""

    def read(self, text: str, is_last: bool) -> dict[str, Any]:
        """Parse the next piece of text: `content` and `tool_calls` of a chunk's delta, if any."""
        events = self._parser.push(text) if text else []
        if is_last:
            events = [*events, *self._parser.finish()]
        content = ""
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, ContentDelta):
                content += event.text
            elif self._is_parallel or event.index == 0:
                self._add_call(calls, event)
        delta: dict[str, Any] = {"content": content} if content else {}
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def _add_call(self, calls: dict[int, dict[str, Any]], event: CallStarted | ArgumentsDelta) -> None:
        if isinstance(event, CallStarted):
            self.has_calls = True
            function = {"name": event.name, "arguments": ""}
            calls[event.index] = {"index": event.index, "id": event.id, "type": "function", "function": function}
        else:
            call = calls.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += event.text
