"""Endpoints for token ids: /tokenize, /detokenize, /tokenizer_info and /inference/v1/generate."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.server.http.body import read_body
from ulysses_infer.server.http.context import AppContext, context_of
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.openai.chat import conversation_with_template
from ulysses_infer.server.http.openai.completions import check_token_ids
from ulysses_infer.server.http.openapi import EVENTS, GENERATING, answers, takes
from ulysses_infer.server.http.protocol.generate import GenerateAnswer, GenerateRequest
from ulysses_infer.server.http.protocol.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from ulysses_infer.server.http.respond import json_response, respond
from ulysses_infer.server.http.token_generation import prepare_tokens
from ulysses_infer.server.tool_calls import check_tools

router = APIRouter(tags=["tokens"])
info_router = APIRouter(tags=["tokens"])
"""Served if server.tokenizer_info is set."""


@router.post("/tokenize", responses=answers(TokenizeAnswer, 400, 404, 413, 415, 503), **takes(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or of messages."""
    context, body = context_of(request), await read_body(request, TokenizeRequest)
    context.check_model(body.model)
    token_ids, info = await _token_ids(context, body), context.engine_info()
    names = [context.texts.token_text(token) for token in token_ids] if body.return_token_strs else None
    return json_response(
        {"count": len(token_ids), "max_model_len": info.max_model_len, "tokens": token_ids, "token_strs": names}
    )


@router.post("/detokenize", responses=answers(DetokenizeAnswer, 400, 404, 413, 415, 503), **takes(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    context, body = context_of(request), await read_body(request, DetokenizeRequest)
    context.check_model(body.model)
    return json_response({"prompt": context.texts.decode(check_token_ids(context, body.tokens))})


@router.post(
    "/inference/v1/generate", responses=answers(GenerateAnswer, *GENERATING, also=EVENTS), **takes(GenerateRequest)
)
async def generate(request: Request) -> Response:
    """Continue token ids."""
    context, body = context_of(request), await read_body(request, GenerateRequest)
    return await respond(request, context, prepare_tokens(context, body))


@info_router.get("/tokenizer_info", responses=answers(TokenizerInfo, 400))
async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's configuration, as in tokenizer_config.json, with the chat template that is used."""
    return json_response(context_of(request).texts.tokenizer_info())


async def _token_ids(context: AppContext, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt")
    if body.prompt is not None:
        return await context.texts.encode(body.prompt, body.add_special_tokens is not False)
    check_tools(body.tools or [])
    text = await context.texts.render(conversation_with_template(context, body))
    return await context.texts.encode(text, bool(body.add_special_tokens))
