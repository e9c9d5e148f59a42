"""Endpoints of Anthropic's API."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.server.http.body import read_body
from ulysses_infer.server.http.context import context_of
from ulysses_infer.server.http.messages.reply import prepare_message
from ulysses_infer.server.http.messages.request import chat_request
from ulysses_infer.server.http.openai.chat import read_chat
from ulysses_infer.server.http.openapi import EVENTS, GENERATING, answers, takes
from ulysses_infer.server.http.protocol.messages import (
    AnthropicErrorAnswer,
    CountTokensAnswer,
    CountTokensRequest,
    MessagesAnswer,
    MessagesRequest,
)
from ulysses_infer.server.http.respond import json_response, respond

router = APIRouter(tags=["Anthropic"])


@router.post(
    "/v1/messages",
    responses=answers(MessagesAnswer, *GENERATING, also=EVENTS, error=AnthropicErrorAnswer),
    **takes(MessagesRequest),
)
async def messages(request: Request) -> Response:
    """Respond to messages."""
    context, body = context_of(request), await read_body(request, MessagesRequest)
    return await respond(request, context, await prepare_message(context, body))


@router.post(
    "/v1/messages/count_tokens",
    responses=answers(CountTokensAnswer, 400, 404, 413, 415, 503, error=AnthropicErrorAnswer),
    **takes(CountTokensRequest),
)
async def count_tokens(request: Request) -> Response:
    """The number of tokens of a prompt."""
    context, body = context_of(request), await read_body(request, CountTokensRequest)
    chat = await read_chat(context, chat_request(body))
    return json_response({"input_tokens": len(chat.prompt.token_ids)})
