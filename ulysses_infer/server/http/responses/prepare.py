"""Checks a request of the Responses API, renders its prompt and runs it, for its client or in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError, api_error, timeout_error
from ulysses_infer.server.http.openai.chat import Chat, read_chat
from ulysses_infer.server.http.outputs import Outputs
from ulysses_infer.server.http.protocol.responses import ResponsesRequest
from ulysses_infer.server.http.respond import PreparedRequest, Run, generation_of, json_response, respond
from ulysses_infer.server.http.responses.items import Item
from ulysses_infer.server.http.responses.reply import ResponseWriter
from ulysses_infer.server.http.responses.request import chat_request, input_items
from ulysses_infer.server.http.responses.store import ResponseStore, StoredResponse
from ulysses_infer.server.http.sse import EventStream, split_events


@dataclass
class Conversation:
    """The items of a request, and those of the responses before it."""

    earlier: list[Item]
    new: list[Item]


async def create_response(
    request: Request, context: AppContext, store: ResponseStore, body: ResponsesRequest
) -> Response:
    """The response to a request. Raises `ApiError`, `RequestError`, `OverloadedError`, `EngineDeadError`."""
    is_stored = body.store is not False and store.max_bytes > 0
    if body.background and not is_stored:
        message = "background needs a stored response; leave out store: false (and see server.response_store_bytes)"
        raise ApiError(400, message, param="background")
    previous = body.previous_response_id
    conversation = Conversation([] if previous is None else store.get(previous).conversation, input_items(body))
    chat = await _fitting_chat(context, body, conversation)
    generation = generation_of(context, "resp_", chat.body, [chat.prompt], chat.params)

    def keep(response: dict[str, Any]) -> None:
        if is_stored and not body.background:
            store.put(StoredResponse(response, conversation.earlier, conversation.new))

    def new_writer(outputs: Outputs) -> ResponseWriter:
        return ResponseWriter(context, body, generation, chat, outputs, is_stored, keep)

    prepared = PreparedRequest(generation, bool(body.stream), new_writer)
    if not body.background:
        return await respond(request, context, prepared)
    return _start(context, store, Run(context, prepared), conversation, bool(body.stream))


async def _fitting_chat(context: AppContext, body: ResponsesRequest, conversation: Conversation) -> Chat:
    """The rendered conversation; with `truncation: auto` without the oldest turns, as far as they do not fit."""
    items = [*conversation.earlier, *conversation.new]
    while True:
        chat = await read_chat(context, chat_request(body, items))
        start = next((at for at, item in enumerate(items) if at and item.get("role") == "user"), 0)
        has_room = len(chat.prompt.token_ids) < context.engine_info().max_model_len
        if has_room or not start or body.truncation != "auto":
            return chat
        items = items[start:]


def _start(
    context: AppContext, store: ResponseStore, run: Run[ResponseWriter], conversation: Conversation, streams: bool
) -> Response:
    """Start a request in the background; the response is its state, or follows it as events."""
    response = run.writer.response
    response["status"] = "queued"
    stored = StoredResponse(response, conversation.earlier, conversation.new)
    stored.task = asyncio.create_task(_work(context, store, run, stored))
    store.put(stored)
    if streams:
        return followed(context, stored, 0)
    return json_response(response)


def followed(context: AppContext, stored: StoredResponse, start: int) -> Response:
    """The events of a background response from number `start` on."""
    failure: Callable[[ApiError], bytes] = lambda error: b""  # noqa: E731  # the response's own events tell
    return EventStream(stored.follow(start), context.config.server.request_timeout, failure)


async def _work(context: AppContext, store: ResponseStore, run: Run[ResponseWriter], stored: StoredResponse) -> None:
    """Run a request to its end, whatever becomes of its client."""
    timeout = context.config.server.request_timeout
    stored.response["status"] = "in_progress"
    try:
        async with asyncio.timeout(timeout), aclosing(run.events()) as events:
            async for data in events:
                stored.add_events(split_events(data))
    except asyncio.CancelledError:
        run.writer.cancel()
        raise
    except Exception as error:  # becomes the response's own error; logged if unexpected
        known = timeout_error(timeout or 0) if isinstance(error, TimeoutError) else api_error(error)
        stored.add_events(split_events(run.writer.failure(known)))
    finally:
        asyncio.get_running_loop().call_soon(_settle, store, stored)


def _settle(store: ResponseStore, stored: StoredResponse) -> None:
    """The task has ended: count what it takes, and let followers end."""
    store.settle(stored)
    stored.notify()


async def cancel_response(store: ResponseStore, response_id: str) -> dict[str, Any]:
    """End a background response; it keeps its output so far. Raises `ApiError`: 404, or 400 for others."""
    stored = store.get(response_id)
    if stored.task is None:
        message = "only background responses can be cancelled; close the connection to end another"
        raise ApiError(400, message, param="response_id")
    stored.task.cancel()
    await asyncio.gather(stored.task, return_exceptions=True)
    return stored.response
