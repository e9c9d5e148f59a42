"""The parts of /openapi.json that FastAPI cannot derive, because routes parse bodies themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ulysses_infer.server.http.errors import ANTHROPIC_PREFIX
from ulysses_infer.server.http.protocol.chat import ChatRequest
from ulysses_infer.server.http.protocol.common import Body, ErrorAnswer
from ulysses_infer.server.http.protocol.completions import CompletionRequest
from ulysses_infer.server.http.protocol.generate import GenerateRequest
from ulysses_infer.server.http.protocol.messages import AnthropicErrorAnswer, CountTokensRequest, MessagesRequest
from ulysses_infer.server.http.protocol.responses import ResponsesRequest
from ulysses_infer.server.http.protocol.rollout import (
    AbortIds,
    InitTransfer,
    NewVersion,
    UpdateWeights,
    WeightVersion,
)
from ulysses_infer.server.http.protocol.service import AbortRequest, PolicyChange
from ulysses_infer.server.http.protocol.tokens import DetokenizeRequest, TokenizeRequest

BODIES: list[type[Body]] = [
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    GenerateRequest,
    TokenizeRequest,
    DetokenizeRequest,
    PolicyChange,
    AbortRequest,
    AbortIds,
    InitTransfer,
    UpdateWeights,
    WeightVersion,
    NewVersion,
]
GENERATING = (400, 404, 413, 415, 500, 503, 504)
"""The statuses of errors of routes that generate."""
Responses = dict[int | str, dict[str, Any]]
REFERENCE = "#/components/schemas/{model}"
EVENTS = {
    "text/event-stream": {
        "schema": {
            # Without a type: OpenAPI 3.1 has none for a stream, which some tools read as text, others event by event.
            "description": "With stream: true: server-sent events as the API's author writes them: chunks, or typed "
            "events, or an error.",
        }
    }
}
MEANINGS = {
    400: "The request is invalid; the message names the field.",
    401: "The key is missing or wrong.",
    403: "Administrative routes are off.",
    404: "Not found.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "A bug, or numbers that are not finite.",
    503: "The server is starting, full or draining, or its engine is dead; Retry-After is set if a retry can help.",
    504: "The request did not end within server.request_timeout.",
}


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """Keyword arguments of a route that reads a `body`."""
    schema = {"$ref": REFERENCE.format(model=body.__name__)}
    return {"openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}}


def answers(
    model: Any, *statuses: int, also: dict[str, Any] | None = None, error: type[BaseModel] = ErrorAnswer
) -> Responses:
    """Responses of a route: `model` as JSON (or in other formats), and errors with these statuses."""
    described: Responses = {200: {"model": model, "description": "Done.", "content": dict(also or {})}}
    for status in statuses:
        described[status] = {"model": error, "description": MEANINGS[status]}
    return described


def described(status: int, meaning: str, model: Any = None) -> Responses:
    """One response."""
    response: dict[str, Any] = {"description": meaning}
    if model is not None:
        response["model"] = model
    return {status: response}


def parameter(name: str, place: str, schema: dict[str, Any], required: bool = True) -> dict[str, Any]:
    """The description of a parameter that a route parses itself."""
    return {"parameters": [{"name": name, "in": place, "required": required, "schema": schema}]}


def document(app: FastAPI, is_open: Callable[[str], bool]) -> Callable[[], dict[str, Any]]:
    """A function for `app.openapi`. is_open: whether a path needs no key."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app, is_open)
        return app.openapi_schema

    return openapi


def _describe(app: FastAPI, is_open: Callable[[str], bool]) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(body, "validation") for body in BODIES], ref_template=REFERENCE)
    components = schema.setdefault("components", {})
    if app.state.context.config.server.unknown_fields == "warn":
        _allow_unknown(bodies["$defs"])
    components["schemas"] = {**components.get("schemas", {}), **bodies["$defs"]}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            is_anthropic = path.startswith(ANTHROPIC_PREFIX)
            _finish(operation, is_open(path), (AnthropicErrorAnswer if is_anthropic else ErrorAnswer).__name__)
    return schema


def _allow_unknown(schemas: dict[str, Any]) -> None:
    strict = {body.__name__ for body in BODIES if body.is_strict}
    for name, schema in schemas.items():
        if schema.get("additionalProperties") is False and name not in strict:
            del schema["additionalProperties"]


def _finish(operation: dict[str, Any], is_open: bool, error_name: str) -> None:
    responses = operation["responses"]
    if not is_open:
        operation["security"] = [{"key": []}]
        error = {"application/json": {"schema": {"$ref": REFERENCE.format(model=error_name)}}}
        responses.setdefault("401", {"description": MEANINGS[401], "content": error})
