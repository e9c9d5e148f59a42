"""Parses a request body into a pydantic type, or raises a one-line error."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from ulysses_infer.server.http.context import context_of
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.protocol.common import Body

logger = logging.getLogger(__name__)
B = TypeVar("B", bound=Body)
Location = Sequence[str | int]
SHOWN_CHARACTERS = 60
MAX_WARNINGS = 1000  # names of unknown fields that are logged; clients choose them
_warned: set[tuple[str, str]] = set()


async def read_body(request: Request, kind: type[B]) -> B:
    """The request's body. Raises `ApiError`: 400, 413 or 415."""
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise ApiError(415, f"the body must be JSON, not {_shown(media)}; send Content-Type: application/json")
    return parse_body(await request.body(), kind, context_of(request).config.server.unknown_fields)


def parse_body(data: bytes, kind: type[B], unknown_fields: str = "reject") -> B:
    """`data` as a `kind`. unknown_fields: as `server.unknown_fields`. Raises `ApiError` 400."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        found = _entries(error)
    unknown = [entry for entry in found if entry["type"] == "extra_forbidden"]
    rejected = [entry for entry in unknown if _is_rejected(entry, kind, unknown_fields)]
    if rejected or not unknown:
        raise _unknown_field(rejected[0], kind) if rejected else _invalid(found)
    try:
        body = kind.model_validate_json(_without(data, [entry["loc"] for entry in unknown]))
    except ValidationError as error:
        raise _misspelled(_entries(error), unknown, kind) or _invalid(_entries(error)) from None
    except (ValueError, RecursionError):  # JSON that Python's parser does not read, such as a number of 5000 digits
        raise _unknown_field(unknown[0], kind) from None
    _warn(unknown, kind)
    return body


def _entries(error: ValidationError) -> list[Any]:
    return error.errors(include_url=False, include_context=False)


def _is_rejected(entry: Any, kind: type[Body], unknown_fields: str) -> bool:
    """Whether an unknown field is an error: null never is, nor an unavailable option that is off."""
    if entry["input"] is None:
        return False
    if entry["loc"][0] in kind.refused and len(entry["loc"]) == 1:
        return bool(entry["input"])
    return unknown_fields == "reject" or kind.is_strict


def _without(data: bytes, locations: Iterable[Location]) -> bytes:
    """The JSON of a body without some of its fields. Raises ValueError or RecursionError."""
    body = json.loads(data)
    for *parents, name in locations:
        owner = body
        for part in parents:
            owner = owner[part]
        owner.pop(name, None)
    return json.dumps(body).encode()


def _misspelled(found: list[Any], unknown: list[Any], kind: type[Body]) -> ApiError | None:
    """The error for the unknown field that is probably a missing one, misspelled."""
    missing = [entry["loc"][-1] for entry in found if entry["type"] == "missing" and len(entry["loc"]) == 1]
    for entry in unknown:
        if len(entry["loc"]) == 1 and difflib.get_close_matches(str(entry["loc"][0]), missing, n=1):
            return _unknown_field(entry, kind)
    return None


def _warn(unknown: list[Any], kind: type[Body]) -> None:
    """One log line per field name, except for those with the value null."""
    for entry in unknown:
        if entry["input"] is None:
            continue
        name = _path([part for part in entry["loc"] if isinstance(part, str)])
        if (kind.__name__, name) not in _warned and len(_warned) < MAX_WARNINGS:
            _warned.add((kind.__name__, name))
            logger.warning("ignored in a request: %s", _unknown(name, entry["loc"], kind))


def _unknown_field(entry: Any, kind: type[Body]) -> ApiError:
    path = _path(entry["loc"])
    return ApiError(400, _unknown(path, entry["loc"], kind), param=path, code="unknown_field")


def _invalid(found: list[Any]) -> ApiError:
    """The error to report: the deepest. If a value fits none of several types, the deepest error belongs to the type
    that came closest."""
    entry = max(found, key=lambda each: len(each["loc"]))
    if entry["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {entry['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    path = _path(entry["loc"])
    if entry["type"] == "missing":
        return ApiError(400, f"{path} is missing", param=path, code="missing_field")
    reason = entry["msg"].removeprefix("Value error, ").removeprefix("Input ")
    text = f"{path or 'the body'} {reason}, got {_shown(entry['input'])}"
    return ApiError(400, text, param=path or None, code="invalid_field")


def _unknown(path: str, location: Location, kind: type[Body]) -> str:
    name = str(location[-1])
    if len(location) > 1:
        return f"unknown field {_shown(path)}; leave it out"
    if name in kind.refused:
        return f"{name} is not available; {kind.refused[name]}"
    nearest = difflib.get_close_matches(name, list(kind.model_fields), n=1)
    return f"unknown field {_shown(name)}; " + (f"did you mean {nearest[0]!r}?" if nearest else "leave it out")


def _path(location: Location) -> str:
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
