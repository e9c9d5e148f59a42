"""Parses a request body into a pydantic type, or raises a one-line error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.protocol.common import Body

B = TypeVar("B", bound=Body)
SHOWN_CHARACTERS = 60


async def read_body(request: Request, kind: type[B]) -> B:
    """The request's body. Raises `ApiError`: 400, 413 or 415."""
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise ApiError(415, f"the body must be JSON, not {_shown(media)}; send Content-Type: application/json")
    return parse_body(await request.body(), kind)


def parse_body(data: bytes, kind: type[B]) -> B:
    """`data` as a `kind`. Raises `ApiError` 400."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error, kind) from None


def _invalid(error: ValidationError, kind: type[Body]) -> ApiError:
    """The error to report: the first unknown field, because it may be a misspelled one; else the deepest. If a value
    fits none of several types, the deepest error belongs to the type that came closest."""
    found = error.errors(include_url=False, include_context=False)
    unknown = [entry for entry in found if entry["type"] == "extra_forbidden"]
    entry = unknown[0] if unknown else max(found, key=lambda each: len(each["loc"]))
    if entry["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {entry['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    path = _path(entry["loc"])
    if unknown:
        return ApiError(400, _unknown(path, entry["loc"], kind), param=path, code="unknown_field")
    if entry["type"] == "missing":
        return ApiError(400, f"{path} is missing", param=path, code="missing_field")
    reason = entry["msg"].removeprefix("Value error, ").removeprefix("Input ")
    text = f"{path or 'the body'} {reason}, got {_shown(entry['input'])}"
    return ApiError(400, text, param=path or None, code="invalid_field")


def _unknown(path: str, location: Sequence[str | int], kind: type[Body]) -> str:
    name = str(location[-1])
    if len(location) > 1:
        return f"unknown field {_shown(path)}; leave it out"
    if name in kind.refused:
        return f"{name} is not available; {kind.refused[name]}"
    nearest = difflib.get_close_matches(name, list(kind.model_fields), n=1)
    return f"unknown field {_shown(name)}; " + (f"did you mean {nearest[0]!r}?" if nearest else "leave it out")


def _path(location: Sequence[str | int]) -> str:
    """`messages[0].role`, without the names that pydantic gives to the types of a union."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in UNION_TYPES and "[" not in part:
            path += f".{part}" if path else part
    return path


UNION_TYPES = frozenset({"str", "int", "bool", "float", "dict", "list"})


def _shown(value: Any) -> str:
    """`value`, shortened to fit into one line."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, Mapping | list) and len(value) > SHOWN_CHARACTERS:
        return f"{len(value)} entries"
    text = repr(value[: 2 * SHOWN_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
