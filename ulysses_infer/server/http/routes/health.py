"""Probes, version, metrics and the dashboard."""

from __future__ import annotations

import math

import msgspec
import yaml
from fastapi import APIRouter
from msgspec import structs
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from ulysses_infer.config.reference import resolved_yaml
from ulysses_infer.server.client import DEGRADED, DRAINING, READY
from ulysses_infer.server.http.context import AppContext, context_of
from ulysses_infer.server.http.errors import JSON, ApiError
from ulysses_infer.server.http.openapi import answers, described, parameter
from ulysses_infer.server.http.protocol.service import AnyAnswer, Health, Load, Version
from ulysses_infer.server.http.respond import json_response
from ulysses_infer.version import __version__

router = APIRouter(tags=["service"])
page_router = APIRouter(tags=["dashboard"])
DEFAULT_SECONDS = 120.0


@router.get("/health", responses=answers(Health) | described(503, "The engine is starting or dead.", Health))
async def health(request: Request) -> Response:
    """Whether the engine is alive; so is a draining server, and a degraded one: some replicas are dead."""
    return _status(context_of(request), READY, DEGRADED, DRAINING)


@router.get("/ready", responses=answers(Health) | described(503, "It takes no requests now.", Health))
async def ready(request: Request) -> Response:
    """Whether requests are accepted: every rank has run a forward pass, and the server does not drain."""
    return _status(context_of(request), READY, DEGRADED)


@router.get("/version", responses=answers(Version))
async def version() -> Response:
    """The version of the server."""
    return json_response({"version": __version__})


@router.get("/ping", responses=answers(Health) | described(503, "The engine is starting or dead.", Health))
@router.post("/ping", responses=answers(Health) | described(503, "The engine is starting or dead.", Health))
async def ping(request: Request) -> Response:
    """The same as /health, under the name that SageMaker asks for."""
    return _status(context_of(request), READY, DEGRADED, DRAINING)


@router.get("/load", responses=answers(Load))
async def load(request: Request) -> Response:
    """The number of requests in progress, for load balancers."""
    return json_response({"server_load": context_of(request).client.num_requests})


@router.get("/server_info", responses=answers(AnyAnswer))
async def server_info(request: Request) -> Response:
    """The resolved recipe, without secrets, and what was loaded."""
    context = context_of(request)
    info = context.client.info
    loaded = None if info is None else {name: value for name, value in structs.asdict(info).items() if name != "state"}
    return json_response(
        {"version": __version__, "config": yaml.safe_load(resolved_yaml(context.config)), "model": loaded}
    )


@router.get("/metrics", response_class=PlainTextResponse, responses=described(200, "Prometheus' exposition format."))
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    observatory = context_of(request).observatory
    return Response(await observatory.scrape(), headers={"Content-Type": observatory.metrics_content_type})


@page_router.get("/dashboard", response_class=HTMLResponse, responses=described(200, "The live page."))
async def dashboard(request: Request) -> Response:
    """The dashboard. The page has no data; it polls /dashboard/data."""
    observatory = context_of(request).observatory
    return HTMLResponse(observatory.page(), headers=observatory.page_headers)


@page_router.get(
    "/dashboard/data",
    responses=answers(AnyAnswer, 400),
    openapi_extra={
        "parameters": [
            *parameter("seconds", "query", {"type": "number", "default": DEFAULT_SECONDS}, False)["parameters"],
            *parameter("since", "query", {"type": "number"}, False)["parameters"],
        ]
    },
)
async def dashboard_data(request: Request) -> Response:
    """The last `seconds` of the history; only what is new since `since`, the `now` of the previous response."""
    seconds = _number(request, "seconds")
    since = _number(request, "since")
    snapshot = context_of(request).observatory.snapshot(DEFAULT_SECONDS if seconds is None else seconds, since)
    return json_response(snapshot)


router.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
router.add_api_route("/ready", ready, methods=["HEAD"], include_in_schema=False)


def _status(context: AppContext, *good: str) -> Response:
    client = context.client
    dead = [{"replica": index, "reason": reason} for index, reason in client.dead_replicas.items()]
    body = msgspec.json.encode({"status": client.status, "reason": client.death or None, "dead_replicas": dead})
    return Response(body, 200 if client.status in good else 503, media_type=JSON)


def _number(request: Request, name: str) -> float | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ApiError(400, f"{name} is {text[:40]!r}, which is not a number", param=name)
    return number
