"""Tools of a chat request: the constraint on the output, and the parser that reads it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ulysses_infer.sampling_params import StructuredOutputs
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.protocol.chat import ChatRequest
from ulysses_infer.server.tool_calls import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    SpecialTags,
    ToolCallParser,
    ToolFormat,
    calls_grammar,
    check_tool_choice,
    check_tools,
    constrained_format,
    formatted_parser,
    special_tags,
    tool_choice_constraint,
)
from ulysses_infer.text.detokenizer import TokenDecoder


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
    special: SpecialTags | None = None
    """Special tokens in the format's markup, which the text for the parser must have and content must not."""
    is_formatted: bool = False
    """Whether an output without calls matches a response format."""

    def reader(self) -> CallReader | None:
        """A reader for one output."""
        if self.format is None:
            return None
        formatted = self.is_formatted
        parser = formatted_parser(self.format, self.tools) if formatted else self.format.parser(self.tools)
        return CallReader(parser, self.is_parallel, self.special)

    def with_response_format(self, body: ChatRequest, wanted: Mapping[str, Any] | None) -> ToolUse:
        """The use of tools if outputs must match `wanted`, unless they call tools.

        A demanded call leaves no room for the response format. Raises `ApiError` if both cannot be combined.
        """
        if wanted is None or self.format is None or self.constraint is not None:
            return self
        tags = {} if self.special is None else self.special.tags
        calls = calls_grammar(self.format, self.tools, tags, self.is_parallel)
        texts = _alternatives(wanted)
        if calls is None or texts is None:
            message = (
                "this format and tool calls cannot be combined; use a JSON schema, json_object or choice, "
                'or set tool_choice to "none"'
            )
            raise ApiError(400, message, param="response_format" if body.response_format else "structured_outputs")
        options = {name: wanted[name] for name in ("disable_any_whitespace", "whitespace_pattern") if name in wanted}
        constraint = StructuredOutputs(alternatives=[*texts, *calls], **options)
        return replace(self, constraint=constraint, is_formatted=True)


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
        return ToolUse(tools, context.tool_format, None, is_parallel=is_parallel, special=_special_tags(context, body))
    constraint = tool_choice_constraint(tools, choice, is_parallel)
    return ToolUse(tools, constrained_format(choice), constraint, isinstance(choice, Mapping), is_parallel)


def _special_tags(context: AppContext, body: ChatRequest) -> SpecialTags | None:
    """The special tokens to treat; None if the request wants to see special tokens."""
    decoder = context.texts.decoder
    if decoder is None or context.tool_format is None or body.skip_special_tokens is False:
        return None
    markup: Any = context.tool_format  # hashable, which the protocol does not say
    return _special_tags_of(markup, decoder)


@functools.lru_cache(8)
def _special_tags_of(markup: ToolFormat, decoder: TokenDecoder) -> SpecialTags | None:
    return special_tags(markup, decoder.special_texts)


def _alternatives(wanted: Mapping[str, Any]) -> list[list[dict[str, Any]]] | None:
    """`wanted` as alternatives of a grammar; None if it is of another kind."""
    if wanted.get("json_object"):
        return [[{"json": {"type": "object"}}]]
    if wanted.get("choice"):
        return [[{"text": text}] for text in wanted["choice"]]
    schema = wanted.get("json")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            return None
    return None if schema is None else [[{"json": schema}]]


class CallReader:
    """Parses the text of one output into content and tool calls, in OpenAI's shapes."""

    def __init__(self, parser: ToolCallParser, is_parallel: bool, special: SpecialTags | None = None) -> None:
        self._parser, self._is_parallel = parser, is_parallel
        self._before_parser = None if special is None else special.before_parser()
        self._in_content = None if special is None else special.in_content()
        self.has_calls = False
        """Whether the output calls a tool."""

    def read(self, text: str, is_last: bool, is_cut: bool = False) -> dict[str, Any]:
        """Parse the next piece of text: `content` and `tool_calls` of a chunk's delta, if any.

        is_cut: the output ended at the limit of its length.
        """
        if self._before_parser is not None:
            text = self._before_parser.feed(text, is_last)
        events = self._parser.push(text) if text else []
        if is_last:
            events = [*events, *self._parser.finish(is_cut)]
        content = ""
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, ContentDelta):
                content += event.text
            elif self._is_parallel or event.index == 0:
                self._add_call(calls, event)
        if self._in_content is not None:
            content = self._in_content.feed(content, is_last)
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
