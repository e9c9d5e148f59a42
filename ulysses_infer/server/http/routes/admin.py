"""Administrative endpoints; `guards.Keys` checks the key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.errors import RequestError
from ulysses_infer.server.http.body import read_body
from ulysses_infer.server.http.context import AppContext, context_of
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.openapi import answers, takes
from ulysses_infer.server.http.protocol.service import Aborted, AbortRequest, AnyAnswer, PolicyChange
from ulysses_infer.server.http.respond import json_response

router = APIRouter(prefix="/admin", tags=["administration"])
COMMAND = (400, 401, 403, 503)
COMMAND_WITH_BODY = (400, 401, 403, 413, 415, 503)


@router.get("/policy", responses=answers(AnyAnswer, *COMMAND))
async def get_policy(request: Request) -> Response:
    """The policy, its settings and the available modes."""
    return await _command(request, "get_policy")


@router.put("/policy", responses=answers(AnyAnswer, *COMMAND_WITH_BODY), **takes(PolicyChange))
async def set_policy(request: Request) -> Response:
    """Change the policy from the next step on."""
    body = await read_body(request, PolicyChange)
    return await _command(request, "set_policy", name=body.name, settings=body.settings)


@router.post("/abort", responses=answers(Aborted, *COMMAND_WITH_BODY, 404), **takes(AbortRequest))
async def abort(request: Request) -> Response:
    """End one request, by the id of its response, or all; their clients get the output generated so far."""
    body = await read_body(request, AbortRequest)
    if body.request_id is None:
        return await _command(request, "abort_all")
    return await _abort(context_of(request), body.request_id)


@router.post("/drain", responses=answers(AnyAnswer, *COMMAND))
async def drain(request: Request) -> Response:
    """Accept no more requests, finish running ones, then exit."""
    return await _command(request, "drain")


@router.post("/reset_prefix_cache", responses=answers(AnyAnswer, *COMMAND))
async def reset_prefix_cache(request: Request) -> Response:
    """Drop cached prefixes; only possible while the engine is idle."""
    return await _command(request, "reset_prefix_cache")


@router.get("/stats", responses=answers(AnyAnswer, *COMMAND))
async def stats(request: Request) -> Response:
    """Counters per mode, queues, cache use and policy."""
    return await _command(request, "stats")


async def _command(request: Request, command: str, /, **arguments: Any) -> Response:
    context = context_of(request)
    context.engine_info()
    return json_response(await context.client.call(command, **arguments))


async def _abort(context: AppContext, answer_id: str) -> Response:
    """A response to several prompts has several engine requests; some may have ended."""
    context.engine_info()
    aborted, reason = [], f"no request {answer_id[:200]!r} is running or waiting; it may have ended"
    for request_id in context.running.get(answer_id, ()):
        try:
            await context.client.call("abort", request_id=request_id)
        except RequestError as error:
            reason = str(error)
        else:
            aborted.append(request_id)
    if not aborted:
        raise ApiError(404, reason, param="request_id", code="unknown_request")
    return json_response({"aborted": aborted})
