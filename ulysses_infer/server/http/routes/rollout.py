"""Endpoints for reinforcement learning, under vLLM's names: pauses, new weights, sleep. They need the admin key."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.errors import RequestError
from ulysses_infer.server.http.body import parse_body, read_body
from ulysses_infer.server.http.context import AppContext, context_of
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.openapi import answers, parameter, takes
from ulysses_infer.server.http.protocol.rollout import (
    AbortCount,
    AbortIds,
    Done,
    InitTransfer,
    NewVersion,
    Paused,
    Sleeping,
    UpdateWeights,
    WeightInfo,
    WeightVersion,
    WorldSize,
)
from ulysses_infer.server.http.respond import json_response

router = APIRouter(tags=["reinforcement learning"])
COMMAND = (400, 401, 403, 503)
WITH_BODY = (400, 401, 403, 413, 415, 503)
POLL_SECONDS = 0.02
FLAG = {"type": "boolean"}


def query(*parameters: dict[str, Any]) -> dict[str, Any]:
    """The description of optional query parameters."""
    return {"parameters": [each for found in parameters for each in found["parameters"]]}


@router.post(
    "/pause",
    responses=answers(Done, *COMMAND),
    openapi_extra=query(
        parameter("mode", "query", {"enum": ["abort", "wait", "keep"], "default": "abort"}, False),
        parameter("clear_cache", "query", {**FLAG, "default": True}, False),
    ),
)
async def pause(request: Request) -> Response:
    """Stop running steps: end all requests (abort), after they have ended (wait), or keep them for /resume (keep).

    New requests wait for /resume. clear_cache: kept requests are computed again, with the weights of then.
    """
    context = context_of(request)
    mode = request.query_params.get("mode", "abort")
    state = await _call(context, "pause", mode=mode, clear_cache=_flag(request, "clear_cache", True))
    while not state["is_paused"]:
        await asyncio.sleep(POLL_SECONDS)
        state = {"is_paused": _is_paused(context)}
    return json_response({"status": "paused"})


@router.post("/resume", responses=answers(Done, *COMMAND))
async def resume(request: Request) -> Response:
    """Run steps again."""
    await _call(context_of(request), "resume")
    return json_response({"status": "resumed"})


@router.get("/is_paused", responses=answers(Paused, *COMMAND))
async def is_paused(request: Request) -> Response:
    """Whether steps are stopped."""
    context = context_of(request)
    context.engine_info()
    return json_response({"is_paused": _is_paused(context)})


@router.post("/abort_requests", responses=answers(AbortCount, *WITH_BODY), **takes(AbortIds))
async def abort_requests(request: Request) -> Response:
    """End requests, by the ids of their responses, or all; their clients get the output generated so far."""
    context, body = context_of(request), await read_body(request, AbortIds)
    if not body.request_ids:
        aborted = (await _call(context, "abort_all"))["aborted"]
    else:
        aborted = [found for name in body.request_ids for found in await _abort(context, name)]
    return json_response({"status": "aborted", "aborted": len(aborted), "request_ids": aborted})


@router.post("/init_weight_transfer_engine", responses=answers(Done, *WITH_BODY), **takes(InitTransfer))
async def init_weight_transfer_engine(request: Request) -> Response:
    """Join the process group of a trainer, its rank 0, which broadcasts weights."""
    body = await read_body(request, InitTransfer)
    await _call(context_of(request), "init_weight_transfer_engine", **body.init_info.model_dump())
    return json_response({"status": "joined"})


@router.post("/start_weight_update", responses=answers(Done, *COMMAND))
async def start_weight_update(request: Request) -> Response:
    """Begin an update of the weights; the engine must be paused or idle."""
    await _call(context_of(request), "start_weight_update")
    return json_response({"status": "started"})


@router.post("/update_weights", responses=answers(Done, *WITH_BODY), **takes(UpdateWeights))
async def update_weights(request: Request) -> Response:
    """Receive tensors that the trainer broadcasts, or load all weights from a folder."""
    body = await read_body(request, UpdateWeights)
    await _call(context_of(request), "update_weights", **body.update_info.model_dump(exclude_none=True))
    return json_response({"status": "updated"})


@router.post("/finish_weight_update", responses=answers(Done, *WITH_BODY), **takes(WeightVersion))
async def finish_weight_update(request: Request) -> Response:
    """Serve the weights that have arrived."""
    data = await request.body()
    body = parse_body(data or b"{}", WeightVersion)
    await _call(context_of(request), "finish_weight_update", weight_version=body.weight_version)
    return json_response({"status": "finished"})


@router.post("/update_weight_version", responses=answers(Done, *WITH_BODY), **takes(NewVersion))
async def update_weight_version(request: Request) -> Response:
    """Name the version of the weights; outputs are tagged with it."""
    body = await read_body(request, NewVersion)
    await _call(context_of(request), "update_weight_version", new_version=body.new_version)
    return json_response({"status": "updated"})


@router.get("/weight_info", responses=answers(WeightInfo, *COMMAND))
async def weight_info(request: Request) -> Response:
    """The version of the weights; null if none was named."""
    return json_response(await _call(context_of(request), "weight_info"))


@router.get("/get_world_size", responses=answers(WorldSize, *COMMAND))
async def get_world_size(request: Request) -> Response:
    """The number of ranks of all replicas."""
    parallel = context_of(request).config.parallel
    return json_response({"world_size": parallel.world_size * parallel.dp})


@router.post(
    "/sleep",
    responses=answers(Done, *COMMAND),
    openapi_extra=query(parameter("level", "query", {"enum": [1, 2], "default": 1}, False)),
)
async def sleep(request: Request) -> Response:
    """Free the memory of the cache (level 1), and of the weights (level 2); the engine must be idle."""
    level = request.query_params.get("level", "1")
    if level not in ("1", "2"):
        raise ApiError(400, f"level is {level[:40]!r}; use 1 (cache) or 2 (cache and weights)", param="level")
    await _call(context_of(request), "sleep", level=int(level))
    return json_response({"status": "asleep"})


@router.post("/wake_up", responses=answers(Done, *COMMAND))
async def wake_up(request: Request) -> Response:
    """Allocate the cache again; after level 2 an update must bring weights."""
    await _call(context_of(request), "wake_up")
    return json_response({"status": "awake"})


@router.get("/is_sleeping", responses=answers(Sleeping, *COMMAND))
async def is_sleeping(request: Request) -> Response:
    """Whether memory is freed."""
    return json_response(await _call(context_of(request), "is_sleeping"))


@router.post("/reset_prefix_cache", responses=answers(Done, *COMMAND))
async def reset_prefix_cache(request: Request) -> Response:
    """Drop cached prefixes; only possible while the engine is idle."""
    await _call(context_of(request), "reset_prefix_cache")
    return json_response({"status": "reset"})


async def _call(context: AppContext, command: str, /, **arguments: Any) -> Any:
    context.engine_info()
    return await context.client.call(command, **arguments)


def _is_paused(context: AppContext) -> bool:
    context.engine_info()
    state = context.client.state
    return state is not None and state.is_paused


async def _abort(context: AppContext, answer_id: str) -> list[str]:
    """End a response's engine requests; those that have ended are left out."""
    aborted = []
    for request_id in context.running.get(answer_id, [answer_id]):
        try:
            aborted += (await _call(context, "abort", request_id=request_id))["aborted"]
        except RequestError:
            continue
    return aborted


def _flag(request: Request, name: str, default: bool) -> bool:
    text = request.query_params.get(name, str(default)).lower()
    if text not in ("true", "false", "1", "0"):
        raise ApiError(400, f"{name} is {text[:40]!r}; use true or false", param=name)
    return text in ("true", "1")
