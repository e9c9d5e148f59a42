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

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import regex

from ulysses_infer.server.tool_calls.definitions import function_of, parameters_of
from ulysses_infer.server.tool_calls.events import ToolCallParser, Tools
from ulysses_infer.server.tool_calls.streaming import NAME, SPACE, StreamingParser, as_json, num_shared

_CALL = regex.compile(rf"(?:<tool_call>{SPACE})?<function=(?P<name>{NAME})>")
_PARAMETER = regex.compile(rf"{SPACE}<parameter=(?P<key>[^<>\n]{{1,256}})>(?P<newline>\n|[^\n])")
_END = regex.compile(rf"{SPACE}</function>")
_CLOSE = regex.compile(rf"{SPACE}</tool_call>")
_VALUE_ENDS = ("\n</parameter>", "</parameter>")


@dataclass(frozen=True)
class Qwen3CoderFormat:
    """Calls in XML-like tags."""

    name: str = "qwen3_coder"
    needs_special_tokens: bool = False

    def parser(self, tools: Tools) -> ToolCallParser:
        """A new parser, for one output."""
        return Qwen3CoderParser(tools)


class Qwen3CoderParser(StreamingParser):
    """Parses the tags of a call. A call that breaks off keeps the arguments parsed so far."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(("<tool_call>", "<function="))
        self._schemas = {function_of(tool)["name"]: parameters_of(tool).get("properties", {}) for tool in tools}
        self._properties: Mapping[str, Any] = {}
        self._schema: Any = None
        self._separator = "{"

    def _open(self) -> bool:
        found, may_come = self._match(_CALL)
        if may_come:
            return False
        if found is None:
            return self._reject()
        self._take(found.end())
        self._start_call(found["name"])
        self._properties, self._separator = self._schemas.get(found["name"], {}), "{"
        self._state = self._inside
        return True

    def _inside(self) -> bool:
        """Between parameters."""
        found, may_come = self._match(_PARAMETER)
        ending, may_end = self._match(_END)
        if found is None and ending is None and (may_come or may_end):
            return False
        if found is None:
            return self._end_call(0 if ending is None else ending.end())
        self._take(found.start("newline") + (found["newline"] == "\n"))
        self._emit_arguments(f"{self._separator}{as_json(found['key'])}: ")
        self._separator = ", "
        self._schema = self._properties.get(found["key"])
        if _is_text(self._schema):
            self._emit_arguments('"')
        self._state = self._value
        return True

    def _value(self) -> bool:
        """A parameter's text, up to its closing tag, without the line break before the tag."""
        ends = [(at, len(end)) for end in _VALUE_ENDS if (at := self._text.find(end)) >= 0]
        if not ends:
            if _is_text(self._schema):
                held = 0 if self._is_final else max(num_shared(self._text, end) for end in _VALUE_ENDS)
                self._give_text(len(self._text) - held)
            elif self._is_final:
                self._emit_arguments(_read_value(self._take(len(self._text)), self._schema))
            return False
        position, length = min(ends)
        if _is_text(self._schema):
            self._give_text(position)
            self._emit_arguments('"')
        else:
            self._emit_arguments(_read_value(self._take(position), self._schema))
        self._take(length)
        self._state = self._inside
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


def _is_text(schema: Any) -> bool:
    """Whether a value is always text: its type is string, or the schema gives none."""
    return not isinstance(schema, Mapping) or schema.get("type", "string" if "enum" not in schema else "") == "string"


def _read_value(text: str, schema: Mapping[str, Any]) -> str:
    """A value as JSON: the text itself if it is JSON (or Python's True, False, None), otherwise a string."""
    plain = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        value = json.loads(plain)
        written = as_json(value)
    except (ValueError, RecursionError):
        return as_json(text)
    return as_json(text) if isinstance(value, str) and "string" in _types(schema) else written


def _types(schema: Mapping[str, Any]) -> list[Any]:
    types = schema.get("type", [])
    return types if isinstance(types, list) else [types]
