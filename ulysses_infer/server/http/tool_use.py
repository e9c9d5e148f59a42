"""Tools of a chat request: the constraint on the output, and the format of the calls in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.protocol.chat import ChatRequest
from ulysses_infer.server.tool_calls import (
    ToolCallParser,
    ToolFormat,
    calls_grammar,
    check_tool_choice,
    check_tools,
    constrained_format,
    formatted_parser,
    named_function,
    tool_choice_constraint,
)
from ulysses_infer.server.tool_calls.pieces import Piece, text_piece
from ulysses_infer.structured_outputs import StructuredOutputs


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request."""

    tools: Sequence[Mapping[str, Any]]
    format: ToolFormat | None
    """The tool-call format; None: outputs are not parsed for calls."""
    constraint: StructuredOutputs | None
    """The constraint on the output: calls alone, or calls and the response format."""
    is_named: bool = False
    """Whether the request names the function to call."""
    is_parallel: bool = True
    """Whether more than one call is allowed."""
    is_formatted: bool = False
    """Whether an output without calls matches a response format."""
    is_allowed: bool = False
    """Whether outputs may call tools."""

    def parser(self) -> ToolCallParser | None:
        """A parser for one output."""
        if self.format is None:
            return None
        return formatted_parser(self.format, self.tools) if self.is_formatted else self.format.parser(self.tools)

    def with_response_format(
        self, body: ChatRequest, wanted: StructuredOutputs | None, tags: Mapping[str, list[int]]
    ) -> ToolUse:
        """The use of tools if outputs must match `wanted`, unless they call tools. tags: those that are special tokens.

        A demanded call leaves no room for the response format. Raises `ApiError` if both cannot be combined.
        """
        if wanted is None or self.constraint is not None:
            return self
        if self.format is None:
            return replace(self, constraint=wanted)
        calls = calls_grammar(self.format, self.tools, tags, self.is_parallel)
        texts = alternatives_of(wanted)
        if calls is None or texts is None:
            message = (
                "this format and tool calls cannot be combined; use a JSON schema, json_object, regex or choice, "
                'or set tool_choice to "none"'
            )
            raise ApiError(400, message, param="response_format" if body.response_format else "structured_outputs")
        return replace(self, constraint=with_alternatives(wanted, [*texts, *calls]), is_formatted=True)


def with_allowed_tools(body: ChatRequest) -> ChatRequest:
    """The request with only the tools that its `tool_choice` of type allowed_tools has; any other request as it is.

    Raises `ApiError`, `RequestError`.
    """
    choice = body.tool_choice
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return body
    allowed = choice.get("allowed_tools")
    mode = allowed.get("mode", "auto") if isinstance(allowed, Mapping) else None
    tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(tools, list):
        message = "tool_choice of type allowed_tools needs allowed_tools with the mode auto or required, and tools"
        raise ApiError(400, message, param="tool_choice")
    check_tools(body.tools or [])
    for tool in tools:
        check_tool_choice(tool, body.tools or [])
    names = {named_function(tool) for tool in tools}
    kept = [tool for tool in body.tools or [] if tool["function"]["name"] in names]
    return body.model_copy(update={"tools": kept, "tool_choice": mode})


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
        return ToolUse(tools, context.tool_format, None, is_parallel=is_parallel, is_allowed=True)
    constraint = tool_choice_constraint(tools, choice, is_parallel)
    return ToolUse(
        tools, constrained_format(choice), constraint, isinstance(choice, Mapping), is_parallel, is_allowed=True
    )


def alternatives_of(wanted: StructuredOutputs) -> list[list[Piece]] | None:
    """A constraint as alternatives of a grammar; None for a grammar, which has no such form."""
    if wanted.json_object:
        return [[{"json": {"type": "object"}}]]
    if wanted.choice:
        return [[text_piece(text)] for text in wanted.choice]
    if wanted.regex:
        return [[{"regex": wanted.regex}]]
    if isinstance(wanted.alternatives, str):
        alternatives: list[list[Piece]] = json.loads(wanted.alternatives)
        return alternatives
    if not isinstance(wanted.json, str):
        return None
    try:
        return [[{"json": json.loads(wanted.json)}]]
    except (ValueError, RecursionError):
        return None


def with_alternatives(wanted: StructuredOutputs, alternatives: list[list[Piece]]) -> StructuredOutputs:
    """A constraint to one of `alternatives`, with the white space of `wanted`. Raises `RequestError`."""
    return StructuredOutputs(
        alternatives=alternatives,
        disable_any_whitespace=wanted.disable_any_whitespace,
        whitespace_pattern=wanted.whitespace_pattern,
    )
