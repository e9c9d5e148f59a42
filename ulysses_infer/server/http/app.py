"""The FastAPI application: routes and middleware."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.errors import EngineDeadError, OverloadedError, RequestError
from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError, error_response
from ulysses_infer.server.http.guards import OPEN_PATHS, BodyLimit, Failsafe, Keys, is_administrative
from ulysses_infer.server.http.openapi import document
from ulysses_infer.server.http.responses.store import ResponseStore
from ulysses_infer.server.http.routes import (
    adapters,
    admin,
    health,
    messages,
    openai,
    profiles,
    responses,
    rollout,
    tokens,
    vectors,
)
from ulysses_infer.version import __version__

DESCRIPTION = "OpenAI's and Anthropic's APIs, served by one engine that shifts between sequence and tensor parallelism."


def make_app(context: AppContext) -> FastAPI:
    """The HTTP application."""
    settings = context.config.server
    app = FastAPIOffline(  # /docs without a CDN
        title="ulysses_infer", version=__version__, description=DESCRIPTION, redirect_slashes=False, redoc_url=None
    )
    app.state.context = context
    app.state.responses = ResponseStore(settings.response_store_bytes)
    for router in (
        openai.router,
        responses.router,
        messages.router,
        tokens.router,
        health.router,
        admin.router,
        rollout.router,
        adapters.router,
        profiles.router,
        vectors.router,
    ):
        app.include_router(router)
    if settings.tokenizer_info:
        app.include_router(tokens.info_router)
    if settings.dashboard:
        app.include_router(health.page_router)
    for kind in (ApiError, RequestError, OverloadedError, EngineDeadError, HTTPException):
        app.add_exception_handler(kind, _answer)
    _add_guards(app, context)
    is_all_open = settings.api_key is None
    app.openapi = document(app, lambda path: path in OPEN_PATHS or (is_all_open and not is_administrative(path)))  # type: ignore[method-assign]
    return app


def _add_guards(app: FastAPI, context: AppContext) -> None:
    """From the innermost to the outermost."""
    settings = context.config.server
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Keys, settings=settings)
    app.add_middleware(Failsafe)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    middleware: Any = context.observatory.middleware
    app.add_middleware(middleware)


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(error, request.url.path)
