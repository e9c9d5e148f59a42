"""Tool calls in tags, one per argument (Qwen3-Coder's chat template):

    <tool_call>
    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    </tool_call>

Values are plain text; the tool's schema gives their JSON types. Those of type string stream as they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import regex

from ulysses_infer.server.tool_calls.definitions import function_of, parameters_of
from ulysses_infer.server.tool_calls.events import ToolCallParser, Tools
from ulysses_infer.server.tool_calls.streaming import NAME, SPACE, StreamingParser, as_json, num_shared
from ulysses_infer.server.tool_calls.values import is_text, property_schema, read_value

_CALL = regex.compile(rf"(?:<tool_call>{SPACE})?<function=(?P<name>{NAME})>")
_PARAMETER = regex.compile(rf"{SPACE}<parameter=(?P<key>[^<>\n]{{1,256}})>(?P<newline>\n|[^\n])")
_END = regex.compile(rf"{SPACE}</function>")
_CLOSE = regex.compile(rf"{SPACE}</tool_call>")
_VALUE_ENDS = ("\n</parameter>", "</parameter>")


@dataclass(frozen=True)
class Qwen3CoderFormat:
    """Calls in XML-like tags."""

    name: str = "qwen3_coder"
    tags: tuple[str, ...] = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>")
    is_bare: bool = False

    def parser(self, tools: Tools) -> ToolCallParser:
        """A new parser, for one output."""
        return Qwen3CoderParser(tools)


class Qwen3CoderParser(StreamingParser):
    """Parses the tags of a call. A call that breaks off keeps the arguments that are complete, and text up to its end.

    A value that is not always a string is given once it is complete.
    """

    def __init__(self, tools: Tools) -> None:
        super().__init__(("<tool_call>", "<function="))
        self._parameters_of = {function_of(tool)["name"]: parameters_of(tool) for tool in tools}
        self._parameters: Mapping[str, Any] = {}
        self._schema: Any = None
        self._is_text = False
        self._head = ""  # what precedes the current value in the arguments
        self._separator = "{"

    def _open(self) -> bool:
        found, may_come = self._match(_CALL)
        if may_come:
            return False
        if found is None:
            return self._drop_unfinished(_CALL) or self._reject()
        self._take(found.end())
        self._start_call(found["name"])
        self._parameters, self._separator = self._parameters_of.get(found["name"], {}), "{"
        self._state = self._inside
        return True

    def _inside(self) -> bool:
        """Between parameters."""
        found, may_come = self._match(_PARAMETER)
        ending, may_end = self._match(_END)
        if found is None and ending is None and (may_come or may_end):
            return False
        if found is None:
            self._end_call(0 if ending is None else ending.end())
            if ending is None and not self._drop_unfinished(_PARAMETER):
                self._drop_unfinished(_END)
            return True
        self._take(found.start("newline") + (found["newline"] == "\n"))
        self._head, self._separator = f"{self._separator}{as_json(found['key'])}: ", ", "
        self._schema = property_schema(self._parameters, found["key"], self._parameters)
        self._is_text = is_text(self._schema, self._parameters)
        if self._is_text:
            self._emit_arguments(self._head + '"')
        self._state = self._value
        return True

    def _value(self) -> bool:
        """A parameter's text, up to its closing tag, without the line break before the tag."""
        ends = [(at, len(end)) for end in _VALUE_ENDS if (at := self._text.find(end)) >= 0]
        if not ends:
            return self._value_so_far()
        position, length = min(ends)
        if self._is_text:
            self._give_text(position)
            self._emit_arguments('"')
        else:
            self._emit_arguments(self._head + read_value(self._take(position), self._schema, self._parameters))
        self._take(length)
        self._state = self._inside
        return True

    def _value_so_far(self) -> bool:
        if self._is_text:
            held = max(num_shared(self._text, end) for end in _VALUE_ENDS)
            self._give_text(len(self._text) - held)
        if not self._is_final:
            return False
        if not self._is_text:
            self._emit_arguments("{}" if self._head.startswith("{") else "}")
        self._take(len(self._text))
        self._state = self._content
        return True

    def _give_text(self, length: int) -> None:
        self._emit_arguments(as_json(self._take(length))[1:-1])

    def _end_call(self, length: int) -> bool:
        self._take(length)
        self._emit_arguments("{}" if self._separator == "{" else "}")
        self._state = self._close
        return True

    def _close(self) -> bool:
        return self._leave_call(_CLOSE)
