"""Endpoints that load and unload LoRA adapters while requests run, under vLLM's names. They need the admin key."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.server.http.body import read_body
from ulysses_infer.server.http.context import context_of
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.openapi import answers, takes
from ulysses_infer.server.http.protocol.adapters import LoadAdapter, UnloadAdapter
from ulysses_infer.server.http.protocol.rollout import Done
from ulysses_infer.server.http.respond import json_response

router = APIRouter(prefix="/v1", tags=["LoRA adapters"])
WITH_BODY = (400, 401, 403, 413, 415, 503)


@router.post("/load_lora_adapter", responses=answers(Done, *WITH_BODY), **takes(LoadAdapter))
async def load_lora_adapter(request: Request) -> Response:
    """Serve an adapter from now on. Needs lora.runtime_bytes."""
    context, body = context_of(request), await read_body(request, LoadAdapter)
    context.engine_info()
    arguments = {"lora_name": body.lora_name, "lora_path": body.lora_path, "load_inplace": bool(body.load_inplace)}
    await context.client.call("load_lora_adapter", **arguments)
    context.adapters[body.lora_name] = body.lora_path
    return json_response({"status": "loaded"})


@router.post("/unload_lora_adapter", responses=answers(Done, *WITH_BODY, 404), **takes(UnloadAdapter))
async def unload_lora_adapter(request: Request) -> Response:
    """Refuse new requests with an adapter; those that run go on."""
    context, body = context_of(request), await read_body(request, UnloadAdapter)
    context.engine_info()
    if body.lora_name not in context.adapters:
        loaded = ", ".join(context.adapters) or "none"
        message = f"adapter {body.lora_name[:200]!r} is not loaded; loaded are: {loaded}"
        raise ApiError(404, message, param="lora_name", code="adapter_not_found")
    await context.client.call("unload_lora_adapter", lora_name=body.lora_name)
    context.adapters.pop(body.lora_name, None)
    return json_response({"status": "unloaded"})
