"""Middleware: API keys, the body size limit, and a response to every failure."""

from __future__ import annotations

import hmac

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ulysses_infer.config import ServerConfig
from ulysses_infer.server.http.errors import ApiError, ClientGoneError, error_response

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics", "/version", "/dashboard"})
ADMIN_PREFIX = "/admin"
ADMIN_PATHS = frozenset(
    {
        "/abort_requests",
        "/finish_weight_update",
        "/get_world_size",
        "/init_weight_transfer_engine",
        "/is_paused",
        "/is_sleeping",
        "/pause",
        "/reset_prefix_cache",
        "/resume",
        "/sleep",
        "/start_profile",
        "/start_weight_update",
        "/stop_profile",
        "/update_weight_version",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/wake_up",
        "/weight_info",
    }
)
"""Routes for reinforcement learning, LoRA adapters and traces, under vLLM's names."""


def is_administrative(path: str) -> bool:
    """Whether a path needs the administrator's key."""
    return path in ADMIN_PATHS or path == ADMIN_PREFIX or path.startswith(ADMIN_PREFIX + "/")


class Keys:
    """Checks the API key that the path requires. The admin key is valid everywhere."""

    def __init__(self, app: ASGIApp, settings: ServerConfig) -> None:
        self._app = app
        self._admin_key = settings.admin_api_key
        self._keys = [key.encode() for key in (settings.api_key, settings.admin_api_key) if key is not None]
        self._asks_all = settings.api_key is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 401 or 403."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal, scope["path"])(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path: str = scope["path"]
        if is_administrative(path):
            return self._admin_refusal(scope)
        if not self._asks_all or path in OPEN_PATHS or _has_key(scope, self._keys):
            return None
        return _unauthorized("the API key is missing or wrong", "server.api_key")

    def _admin_refusal(self, scope: Scope) -> ApiError | None:
        if self._admin_key is None:
            message = "administrative routes are off; start the server with server.admin_api_key"
            return ApiError(403, message, "permission_error", code="admin_disabled")
        if _has_key(scope, [self._admin_key.encode()]):
            return None
        return _unauthorized("the administrator's key is missing or wrong", "server.admin_api_key")


def _unauthorized(what: str, setting: str) -> ApiError:
    message = f"{what}; send Authorization: Bearer and the key that the server has as {setting}"
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, "authentication_error", code="invalid_api_key", headers=headers)


def _has_key(scope: Scope, keys: list[bytes]) -> bool:
    """Compares in constant time. The key is in `Authorization: Bearer`, or in `x-api-key` as in Anthropic's API."""
    given = [(name, value) for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")]
    tokens = [_token(name, value) for name, value in given]
    if len(tokens) != 1 or tokens[0] is None:
        return False
    token = tokens[0]
    return any([hmac.compare_digest(token, key) for key in keys])  # noqa: C419  # all, for the same time


def _token(name: bytes, value: bytes) -> bytes | None:
    if name == b"x-api-key":
        return bytes(value.strip())
    return bytes(value[7:].strip()) if value[:7].lower() == b"bearer " else None


class BodyLimit:
    """Refuses a body that is too large, by its declared length or once too much has arrived."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count its bytes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _declared_length(scope) > self._max_bytes:
            await error_response(self._too_large(), scope["path"])(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._max_bytes} bytes (server.max_body_bytes); send less"
        # the rest will not be read, so the connection cannot be reused
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _declared_length(scope: Scope) -> int:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(lengths[0]) if lengths and lengths[0].isdigit() else 0


class Failsafe:
    """Responds to errors that no handler caught: status 500 in the usual shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; respond to any exception, unless a response has started."""
        is_started = False

        async def watched(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except (ClientGoneError, ClientDisconnect):  # before or after the body was complete
            return
        except Exception as error:  # respond to the client in any case; the log gets the traceback
            if is_started or scope["type"] != "http":
                raise
            await error_response(error, scope["path"])(scope, receive, send)
