"""Argument values that a model writes as text: their JSON, by the tool's schema.

A value is a string where the schema accepts one. Otherwise it is what its text is in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ulysses_infer.server.tool_calls.streaming import as_json
from ulysses_infer.text.structured_references import targets

MAX_DEPTH = 16
_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}
_ANY_TEXT = object()  # stands for every string


def property_schema(parameters: Any, key: str, root: Any, depth: int = 0) -> Any:
    """The schema of the property `key` of objects of the schema `parameters`; None if there is none."""
    if not isinstance(parameters, Mapping) or depth > MAX_DEPTH:
        return None
    found = []
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        found.append(properties[key])
    parts = [*targets(parameters.get("$ref"), root), *_list(parameters, "allOf")]
    found += [property_schema(part, key, root, depth + 1) for part in parts]
    for name in ("anyOf", "oneOf"):
        inner = [property_schema(part, key, root, depth + 1) for part in _list(parameters, name)]
        options = [option for option in inner if option is not None]
        found.append({"anyOf": options} if options else None)
    found = [schema for schema in found if schema is not None]
    if not found and isinstance(parameters.get("additionalProperties"), Mapping):
        found.append(parameters["additionalProperties"])
    return {"allOf": found} if len(found) > 1 else found[0] if found else None


def is_text(schema: Any, root: Any) -> bool:
    """Whether a value is a string, whatever its text."""
    return schema is None or (_accepts(_ANY_TEXT, schema, root) and not _names_null(schema, root))


def read_value(text: str, schema: Any, root: Any) -> str:
    """The value as JSON. Text that is neither accepted nor JSON becomes a string."""
    plain = _PYTHON_NAMES.get(text.strip(), text)
    if plain.strip() == "null" and _names_null(schema, root):
        return "null"
    if _accepts(text, schema, root):
        return as_json(text)
    try:
        value = json.loads(plain)
        written = as_json(value)
    except (ValueError, RecursionError):
        return as_json(text)
    return as_json(text) if isinstance(value, str) and not _accepts(value, schema, root) else written


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    parts = schema.get(key)
    return list(parts) if isinstance(parts, list | tuple) else []


def _accepts(value: Any, schema: Any, root: Any, depth: int = 0) -> bool:
    """Whether the schema accepts the scalar `value`, as far as types and constants say."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return schema is not False
    types = schema.get("type")
    if types is not None and not _has_type(value, list(types) if isinstance(types, list | tuple) else [types]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in _list(schema, "enum"):
        return False
    every = [*targets(schema.get("$ref"), root), *_list(schema, "allOf")]
    some = [_list(schema, name) for name in ("anyOf", "oneOf") if name in schema]
    excluded = schema.get("not")
    return (
        all(_accepts(value, part, root, depth + 1) for part in every)
        and all(any(_accepts(value, part, root, depth + 1) for part in parts) for parts in some)
        and not (_is_simple(excluded) and _accepts(value, excluded, root, depth + 1))
    )


def _has_type(value: Any, types: list[Any]) -> bool:
    return ("string" if value is _ANY_TEXT or isinstance(value, str) else "null") in types


def _is_simple(schema: Any) -> bool:
    """Whether types and constants say all about a schema."""
    return isinstance(schema, Mapping) and not set(schema) - {"type", "const", "enum"}


def _names_null(schema: Any, root: Any) -> bool:
    """Whether the schema accepts null and says so, rather than accepting anything."""
    return _mentions_null(schema, root, 0) and _accepts(None, schema, root)


def _mentions_null(schema: Any, root: Any, depth: int) -> bool:
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return False
    types = schema.get("type")
    if types == "null" or (isinstance(types, list | tuple) and "null" in types):
        return True
    if ("const" in schema and schema["const"] is None) or None in _list(schema, "enum"):
        return True
    parts = [part for name in ("allOf", "anyOf", "oneOf") for part in _list(schema, name)]
    return any(_mentions_null(part, root, depth + 1) for part in [*targets(schema.get("$ref"), root), *parts])
