"""A required `tool_choice` as a constraint on the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ulysses_infer.server.tool_calls.definitions import ToolChoice, function_of, named_function, parameters_of
from ulysses_infer.server.tool_calls.events import (
    ArgumentsDelta,
    CallStarted,
    ToolCallParser,
    ToolEvent,
    ToolFormat,
    Tools,
)
from ulysses_infer.server.tool_calls.json_calls import REQUIRED
from ulysses_infer.server.tool_calls.streaming import call_id
from ulysses_infer.structured_outputs import StructuredOutputs

_DATA_KEYS = ("const", "enum", "default", "examples")  # keywords with plain values, in which "$ref" is not a reference
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # names to schemas


def tool_choice_constraint(tools: Tools, tool_choice: ToolChoice, parallel: bool = True) -> StructuredOutputs | None:
    """The constraint that forces the calls demanded by `tool_choice`; None if it demands none ("none", "auto", None).

    `tools` and `tool_choice` must have been checked. `parallel`: whether "required" may give more than one call. The
    output for a named function is its arguments alone. Raises RequestError if the schemas are too large.
    """
    name = named_function(tool_choice)
    if name is not None:
        chosen = next(tool for tool in tools if function_of(tool)["name"] == name)
        return StructuredOutputs(json=parameters_of(chosen))
    if tool_choice != "required":
        return None
    calls = call_schema(tools, "parameters")
    definitions = calls.pop("$defs")
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": calls}
    if not parallel:
        schema["maxItems"] = 1
    return StructuredOutputs(json={**schema, "$defs": definitions})


def constrained_format(tool_choice: ToolChoice) -> ToolFormat:
    """The format of outputs under `tool_choice_constraint(…, tool_choice)`, regardless of the model's own format."""
    name = named_function(tool_choice)
    return REQUIRED if name is None else NamedFormat(name)


def call_schema(tools: Tools, key: str) -> dict[str, Any]:
    """The schema of one call as an object with its name and, as `key`, its arguments; with `$defs` at its top."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function_of(tool)["name"]}, key: {"$ref": _place(tool)}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"anyOf": calls, "$defs": {name: part for tool in tools for name, part in _definition(tool).items()}}


def parameters_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, as a reference into its `$defs`."""
    return {"$ref": _place(tool), "$defs": _definition(tool)}


def _definition(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, by the tool's name. Its own identifier would change what references mean."""
    schema = {key: value for key, value in parameters_of(tool).items() if key not in ("$id", "$schema")}
    return {function_of(tool)["name"]: _moved(schema, tool)}


def _place(tool: Mapping[str, Any]) -> str:
    return f"#/$defs/{function_of(tool)['name']}"


def _moved(schema: Any, tool: Mapping[str, Any]) -> Any:
    """The schema with its internal references moved to its new place, `#/$defs/<name>`."""
    if isinstance(schema, list):
        return [_moved(part, tool) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            moved[key] = {name: _moved(part, tool) for name, part in value.items()}
        else:
            moved[key] = value if key in _DATA_KEYS else _moved(value, tool)
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = _place(tool) + reference[1:]
    return moved


@dataclass(frozen=True)
class NamedFormat:
    """An output that consists of the arguments of the function `function` only."""

    function: str
    name: str = "named"
    tags: tuple[str, ...] = ()
    is_bare: bool = True

    def parser(self, tools: Tools) -> ToolCallParser:
        """A new parser, for one output."""
        return NamedParser(self.function)


class NamedParser:
    """Passes all text on as the arguments of one call."""

    def __init__(self, function: str) -> None:
        self._function = function
        self._has_started = False

    def push(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text; returns the new events."""
        if not text:
            return []
        events: list[ToolEvent] = [ArgumentsDelta(0, text)]
        if not self._has_started:
            events.insert(0, CallStarted(0, call_id(), self._function))
        self._has_started = True
        return events

    def finish(self, is_cut: bool = False) -> list[ToolEvent]:
        """Nothing is held back."""
        return []
