"""Whether the options of a `oneOf` exclude each other."""

from __future__ import annotations

import itertools
from typing import Any

from ulysses_infer.text.structured_references import targets

MAX_OPTIONS = 64
MAX_DEPTH = 4
MAX_COMPARISONS = 20_000


def disjoint_options(part: dict[str, Any], root: Any) -> list[Any] | None:
    """The options of `part["oneOf"]` for an `anyOf`, if no value matches two of them; otherwise None.

    With a `discriminator` the options require its property, as OpenAPI says and pydantic does not write.
    """
    options = part["oneOf"]
    if not isinstance(options, list) or not 0 < len(options) <= MAX_OPTIONS:
        return None
    discriminator = part.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    if isinstance(name, str):
        options = [{"allOf": [option, {"type": "object", "required": [name]}]} for option in options]
    comparison = _Comparison(root)
    pairs = itertools.combinations(options, 2)
    return options if all(comparison.are_disjoint(first, second, 0) for first, second in pairs) else None


class _Comparison:
    """Compares schemas in one document, within a limit of work."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._num_left = MAX_COMPARISONS

    def are_disjoint(self, first: Any, second: Any, depth: int) -> bool:
        """Whether it is certain that no value matches both."""
        if first is False or second is False:
            return True
        if depth > MAX_DEPTH:
            return False
        ones, others = self._facets(first), self._facets(second)
        if any(self._exclude(one, other, depth) for one in ones for other in others):
            return True
        return self._exclude_keys(ones, others, depth)

    def _facets(self, schema: Any) -> list[dict[str, Any]]:
        """The schemas that all apply to a value of `schema`."""
        found: list[dict[str, Any]] = []
        waiting = [schema]
        while waiting and len(found) < MAX_OPTIONS:
            part = waiting.pop()
            if isinstance(part, dict):
                found.append(part)
                waiting += part["allOf"] if isinstance(part.get("allOf"), list) else []
                waiting += targets(part["$ref"], self._root) if "$ref" in part else []
        return found

    def _exclude(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        self._num_left -= 1
        if self._num_left < 0:
            return False
        for first, second in ((one, other), (other, one)):
            options = first.get("anyOf")
            if isinstance(options, list) and all(self.are_disjoint(part, second, depth + 1) for part in options):
                return True
        values, more = _values(one), _values(other)
        if values is not None and more is not None:
            return not any(value == given for value in values for given in more)  # True == 1: the safe side
        types, kinds = _types(one), _types(other)
        return types is not None and kinds is not None and not types & kinds

    def _exclude_keys(self, ones: list[dict[str, Any]], others: list[dict[str, Any]], depth: int) -> bool:
        """Whether both are objects, with a required property that cannot match both."""
        if not all(any(_types(part) == {"object"} for part in parts) for parts in (ones, others)):
            return False
        required = {key for part in (*ones, *others) for key in _required(part)}
        return any(
            self.are_disjoint(first, second, depth + 1)
            for key in required
            for first in _property(ones, key)
            for second in _property(others, key)
        )


def _required(part: dict[str, Any]) -> list[str]:
    keys = part.get("required")
    return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []


def _property(parts: list[dict[str, Any]], key: str) -> list[Any]:
    maps = [part["properties"] for part in parts if isinstance(part.get("properties"), dict)]
    return [properties[key] for properties in maps if key in properties]


def _values(part: dict[str, Any]) -> list[Any] | None:
    if "const" in part:
        return [part["const"]]
    return part["enum"] if isinstance(part.get("enum"), list) else None


def _types(part: dict[str, Any]) -> set[str] | None:
    """The types of its values, integers counted as numbers; None if any."""
    values = _values(part)
    if values is not None:
        return {_type(value) for value in values}
    types = part.get("type")
    names = [types] if isinstance(types, str) else types
    if not isinstance(names, list):
        return None
    return {"number" if name == "integer" else str(name) for name in names}


def _type(value: Any) -> str:
    kinds = {bool: "boolean", type(None): "null", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "number")
