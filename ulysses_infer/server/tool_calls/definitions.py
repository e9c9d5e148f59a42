"""Checks the `tools` and `tool_choice` of a request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ulysses_infer.errors import RequestError
from ulysses_infer.server.tool_calls.events import Tools

ToolChoice = str | Mapping[str, Any] | None
"""none | auto | required, `{"type": "function", "function": {"name": …}}`, or None for the default."""

MAX_TOOLS = 512
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The definition inside a checked tool."""
    function: Mapping[str, Any] = tool["function"]
    return function


def names_of(tools: Tools) -> list[str]:
    """The names of checked tools."""
    return [function_of(tool)["name"] for tool in tools]


def parameters_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of a checked tool's arguments, always an object. Without a schema there are no arguments, as in
    OpenAI's API."""
    schema = function_of(tool).get("parameters")
    return dict(NO_PARAMETERS) if schema is None else {**schema, "type": "object"}


def check_tools(tools: Any) -> None:
    """Raises RequestError unless `tools` is a list of function definitions in OpenAI's shape."""
    if not isinstance(tools, list | tuple):
        raise RequestError(f"tools must be a list of function definitions, got {type(tools).__name__}; use []")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries; use at most {MAX_TOOLS}")
    seen: set[str] = set()
    for position, tool in enumerate(tools):
        name = _check_tool(tool, f"tools[{position}]")
        if name in seen:
            raise RequestError(f"tools has two functions named {name!r}; rename one")
        seen.add(name)


def check_tool_choice(tool_choice: Any, tools: Tools | None) -> None:
    """Raises RequestError if `tool_choice` is malformed or names a function that is not in the checked `tools`."""
    if tool_choice is None or tool_choice in ("none", "auto"):
        return
    if tool_choice == "required":
        if not tools:
            raise RequestError("tool_choice is 'required', but there are no tools; give tools or use 'none'")
        return
    name = named_function(tool_choice)
    if name is None:
        raise RequestError(
            f"tool_choice {str(tool_choice)[:60]!r} is unknown; use 'none', 'auto', 'required' or "
            '{"type": "function", "function": {"name": "…"}}'
        )
    if name not in names_of(tools or ()):
        known = ", ".join(names_of(tools or ())) or "none"
        raise RequestError(f"tool_choice names the function {name[:64]!r}, which is not in tools; known: {known[:200]}")


def named_function(tool_choice: ToolChoice) -> str | None:
    """The function that a `tool_choice` names, or None if it names none."""
    if not isinstance(tool_choice, Mapping) or tool_choice.get("type", "function") != "function":
        return None
    function = tool_choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _check_tool(tool: Any, where: str) -> str:
    """Check one definition; returns its name."""
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(f'{where} is not a function; use {{"type": "function", "function": {{"name": "…"}}}}')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise RequestError(f'{where} has no "function" object; use {{"type": "function", "function": {{"name": "…"}}}}')
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{where} has the name {str(name)[:80]!r}; use 1 to 64 letters, digits, '_', '-' or '.'")
    if not isinstance(function.get("description") or "", str):
        raise RequestError(f"{where} ({name}) has a description that is not text; use a string")
    _check_parameters(function.get("parameters"), f"{where} ({name})")
    return name


def _check_parameters(schema: Any, where: str) -> None:
    if schema is None:
        return
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise RequestError(f'{where} has parameters that are no object\'s JSON schema; use {{"type": "object", …}}')
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise RequestError(f"{where} has properties that are no object; map names to schemas")
    for key, value in properties.items():
        if not isinstance(value, Mapping | bool):
            raise RequestError(f"{where} has a schema for {str(key)[:60]!r} that is not an object; {{}} allows any")
    required = schema.get("required", [])
    if not isinstance(required, list | tuple) or not all(isinstance(key, str) for key in required):
        raise RequestError(f"{where} has 'required' that is not a list of names; use [] if nothing is required")
