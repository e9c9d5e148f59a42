"""Endpoints of the OpenAI API: completions, chat, models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.server.http.body import read_body
from ulysses_infer.server.http.context import AppContext, context_of
from ulysses_infer.server.http.openai.chat import prepare_chat
from ulysses_infer.server.http.openai.completions import prepare_completion
from ulysses_infer.server.http.openapi import EVENTS, GENERATING, answers, parameter, takes
from ulysses_infer.server.http.protocol.chat import ChatAnswer, ChatRequest
from ulysses_infer.server.http.protocol.completions import CompletionAnswer, CompletionRequest
from ulysses_infer.server.http.protocol.service import ModelCard, ModelList
from ulysses_infer.server.http.respond import json_response, respond

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/completions", responses=answers(CompletionAnswer, *GENERATING, also=EVENTS), **takes(CompletionRequest)
)
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    context, body = context_of(request), await read_body(request, CompletionRequest)
    return await respond(request, context, await prepare_completion(context, body))


@router.post("/v1/chat/completions", responses=answers(ChatAnswer, *GENERATING, also=EVENTS), **takes(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Respond to a conversation."""
    context, body = context_of(request), await read_body(request, ChatRequest)
    return await respond(request, context, await prepare_chat(context, body))


@router.get("/v1/models", responses=answers(ModelList))
async def models(request: Request) -> Response:
    """The served model and its adapters."""
    context = context_of(request)
    return json_response({"object": "list", "data": [_card(context, name) for name in context.model_names]})


@router.get(
    "/v1/models/{model:path}",
    responses=answers(ModelCard, 404),
    openapi_extra=parameter("model", "path", {"type": "string"}),
)
async def model(request: Request) -> Response:
    """The served model, or one of its adapters."""
    context, name = context_of(request), request.path_params["model"]
    context.check_model(name)
    return json_response(_card(context, name))


def _card(context: AppContext, name: str) -> dict[str, Any]:
    info, adapter = context.client.info, context.adapters.get(name)
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "ulysses_infer",
        "root": adapter or context.config.model.path,
        "parent": context.model_name if adapter else None,
        "max_model_len": None if info is None else info.max_model_len,
    }
