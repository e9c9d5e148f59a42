"""Errors in OpenAI's shape, with a status that shows whether a retry can help."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ulysses_infer.errors import EngineDeadError, OverloadedError, ReplicaLostError, RequestError, first_line

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
RETRY_SECONDS = 1
JSON = "application/json"
ANTHROPIC_PREFIX = "/v1/messages"
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error response. param: the field at fault; code: a machine-readable code."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The error in Anthropic's shape."""
        kind = ANTHROPIC_KINDS.get(self.status, INVALID if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


class ClientGoneError(Exception):
    """The client has disconnected: nobody reads the response."""


def api_error(error: Exception) -> ApiError:
    """`error` as the client sees it. An unexpected error is a bug in the server: status 500, with the traceback in the
    log."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error))
        case OverloadedError():
            headers = {"Retry-After": str(RETRY_SECONDS)}
            code = "replica_lost" if isinstance(error, ReplicaLostError) else "overloaded"
            return ApiError(503, str(error), "service_unavailable", code=code, headers=headers)
        case EngineDeadError():
            return ApiError(503, f"the engine is dead: {error}", "service_unavailable", code="engine_dead")
        case HTTPException():
            return _routing_error(error)
    logger.error("a request met a bug", exc_info=error)
    return ApiError(500, f"internal error: {first_line(error)}", "internal_error", code="internal_error")


def timeout_error(seconds: float) -> ApiError:
    """The request took too long. Status 504, because 408 would mean that the client sent its request too slowly."""
    message = f"the request took longer than {seconds:g} s (server.request_timeout); ask for fewer tokens or try later"
    return ApiError(504, message, "timeout_error", code="request_timeout")


def error_response(error: Exception, path: str) -> Response:
    """The response to a request of `path` that raised `error`, in the shape of the path's API."""
    answer = api_error(error)
    body = answer.anthropic_body if path.startswith(ANTHROPIC_PREFIX) else answer.body
    return Response(msgspec.json.encode(body), answer.status, answer.headers, JSON)


def _routing_error(error: HTTPException) -> ApiError:
    messages = {
        404: "there is no such route; see /docs for those there are",
        405: "the route does not take this method; see the Allow header",
    }
    codes = {404: "unknown_route", 405: "method_not_allowed"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, code=codes.get(error.status_code), headers=error.headers)
