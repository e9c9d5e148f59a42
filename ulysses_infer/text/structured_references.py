"""References inside one JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MAX_REFERENCES = 32  # in a chain


def targets(reference: Any, root: Any) -> Iterator[Any]:
    """The schema at a JSON pointer such as `#/$defs/x`; nothing for other or dangling references."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return
    place = root
    for segment in unquote(reference[2:]).split("/") if len(reference) > 2 else ():
        key = segment.replace("~1", "/").replace("~0", "~")
        if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
            place = place[int(key)]
        elif isinstance(place, dict) and key in place:
            place = place[key]
        else:
            return
    yield place


def resolve(schema: Any, root: Any) -> Any:
    """`schema`, or what it refers to if it is a reference alone."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            return schema
        found = list(targets(schema["$ref"], root))
        if not found:
            return schema
        schema = found[0]
    return schema
