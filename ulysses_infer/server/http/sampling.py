"""Converts request fields to `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ulysses_infer.errors import RequestError
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.protocol.common import EngineFields, SamplingFields

ALIASES = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
NAMES = frozenset(SamplingFields.model_fields) - {"model"}


def sampling_params(body: EngineFields, defaults: Mapping[str, Any], **changes: Any) -> SamplingParams:
    """The sampling parameters of a request. `changes` replace fields; `defaults` are the model's, for fields that are
    not given, `max_tokens` only where `changes` has it as None. Raises `ApiError` that names the field."""
    values = {name: getattr(body, name) for name in NAMES} | changes
    mapping = {name: value for name, value in values.items() if value is not None or name in changes}
    usual = {name: value for name, value in defaults.items() if name != "max_tokens" or name in changes}
    mapping |= {name: value for name, value in usual.items() if mapping.get(name) is None}
    try:
        return SamplingParams.from_mapping(mapping)
    except RequestError as error:
        first_word = str(error).partition(" ")[0].partition("=")[0].partition("[")[0]
        raise ApiError(400, str(error), param=first_word if first_word in NAMES else None) from None


def structured_outputs(body: EngineFields) -> Mapping[str, Any] | None:
    """The constraint on the output, from the one field that has it. Raises `ApiError` if two fields do."""
    found: dict[str, Mapping[str, Any]] = {}
    if body.structured_outputs is not None:
        given = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        found["structured_outputs"] = given
    for alias, name in ALIASES.items():
        if getattr(body, alias) is not None:
            found[alias] = {name: getattr(body, alias)}
    wanted = _response_format(body)
    if wanted is not None:
        found["response_format"] = wanted
    if len(found) > 1:
        names = " and ".join(found)
        raise ApiError(400, f"{names} each constrain the output; use only one", param=list(found)[-1])
    chosen = next(iter(found.values()), None)
    if chosen is None or body.guided_whitespace_pattern is None:
        return chosen
    return {**chosen, "whitespace_pattern": body.guided_whitespace_pattern}


def _response_format(body: EngineFields) -> Mapping[str, Any] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        message = "response_format has no json_schema.schema; give one or use type json_object"
        raise ApiError(400, message, param="response_format")
    return {"json": wanted.json_schema.schema_}
