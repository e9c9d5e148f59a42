"""Endpoints that record traces of torch's profiler, under vLLM's names. They need the admin key."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.server.http.context import context_of
from ulysses_infer.server.http.openapi import answers
from ulysses_infer.server.http.protocol.rollout import Done
from ulysses_infer.server.http.respond import json_response

router = APIRouter(tags=["administration"])
COMMAND = (400, 401, 403, 503)


@router.post("/start_profile", responses=answers(Done, *COMMAND))
async def start_profile(request: Request) -> Response:
    """Record a trace on every rank, to runtime.profile_folder, until /stop_profile."""
    await _call(request, "start_profile")
    return json_response({"status": "profiling"})


@router.post("/stop_profile", responses=answers(Done, *COMMAND))
async def stop_profile(request: Request) -> Response:
    """Write the traces: one file per rank. No step runs meanwhile."""
    await _call(request, "stop_profile")
    return json_response({"status": "written"})


async def _call(request: Request, command: str) -> None:
    context = context_of(request)
    context.engine_info()
    await context.client.call(command)
