"""Endpoints of the Responses API."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.server.http.body import read_body
from ulysses_infer.server.http.context import context_of
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.openapi import EVENTS, GENERATING, answers, parameter, takes
from ulysses_infer.server.http.protocol.responses import (
    DeletedResponse,
    ItemList,
    ResponsesAnswer,
    ResponsesRequest,
)
from ulysses_infer.server.http.respond import json_response
from ulysses_infer.server.http.responses.prepare import cancel_response, create_response, followed
from ulysses_infer.server.http.responses.store import ResponseStore

router = APIRouter(tags=["Responses"])
ID = parameter("response_id", "path", {"type": "string"})
STREAM = [
    *ID["parameters"],
    *parameter("stream", "query", {"type": "boolean"}, False)["parameters"],
    *parameter("starting_after", "query", {"type": "integer", "minimum": -1}, False)["parameters"],
]


@router.post("/v1/responses", responses=answers(ResponsesAnswer, *GENERATING, also=EVENTS), **takes(ResponsesRequest))
async def create(request: Request) -> Response:
    """Respond to text or items."""
    context, body = context_of(request), await read_body(request, ResponsesRequest)
    return await create_response(request, context, _store(request), body)


@router.post("/v1/responses/compact", include_in_schema=False)
async def compact(request: Request) -> Response:
    """Always 404: not offered, and clients that try it go on without."""
    raise ApiError(404, "this server compacts no conversations; send fewer items, or truncation: auto")


@router.get(
    "/v1/responses/{response_id}",
    responses=answers(ResponsesAnswer, 400, 404, also=EVENTS),
    openapi_extra={"parameters": STREAM},
)
async def retrieve(request: Request) -> Response:
    """A stored response; with stream=true the events of a background response, from starting_after on."""
    stored = _store(request).get(request.path_params["response_id"])
    if request.query_params.get("stream", "false").lower() not in ("true", "1"):
        return json_response(stored.response)
    if stored.task is None:
        raise ApiError(400, "only background responses can be followed; leave out stream", param="stream")
    return followed(context_of(request), stored, _start_number(request))


@router.delete("/v1/responses/{response_id}", responses=answers(DeletedResponse, 404), openapi_extra=ID)
async def delete(request: Request) -> Response:
    """Forget a stored response."""
    name = request.path_params["response_id"]
    _store(request).delete(name)
    return json_response({"id": name, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", responses=answers(ResponsesAnswer, 400, 404), openapi_extra=ID)
async def cancel(request: Request) -> Response:
    """End a background response."""
    return json_response(await cancel_response(_store(request), request.path_params["response_id"]))


@router.get("/v1/responses/{response_id}/input_items", responses=answers(ItemList, 404), openapi_extra=ID)
async def input_items(request: Request) -> Response:
    """The items that a stored response responds to, the newest first."""
    stored = _store(request).get(request.path_params["response_id"])
    items = [*stored.earlier, *stored.input][::-1]
    ends = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return json_response({"object": "list", "data": items, "first_id": ends[0], "last_id": ends[1], "has_more": False})


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def _start_number(request: Request) -> int:
    text = request.query_params.get("starting_after", "-1")
    try:
        return max(int(text) + 1, 0)
    except ValueError:
        raise ApiError(
            400, f"starting_after is {text[:40]!r}, which is not an integer", param="starting_after"
        ) from None
