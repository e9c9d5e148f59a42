"""The Responses API, used through OpenAI's client."""

from __future__ import annotations

import json

import openai
import pytest

from tests.server.http.harness import MODEL, Served, wait_for
from tests.server.http.test_tools import DollarFormat
from tests.tiny import encode
from ulysses_infer.server.http.protocol.responses import ResponsesRequest
from ulysses_infer.server.http.responses.request import chat_messages, chat_request, input_items
from ulysses_infer.server.http.responses.store import ResponseStore, StoredResponse
from ulysses_infer.server.reasoning import FORMATS

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}


def test_a_response_has_items_a_status_and_usage(server: Served) -> None:
    answer = server.openai.responses.create(model=MODEL, input="hi", max_output_tokens=50, metadata={"a": "b"})
    assert (answer.output_text, answer.status, answer.object) == ("hello world", "completed", "response")
    assert [(item.type, item.role, item.status) for item in answer.output] == [("message", "assistant", "completed")]
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len("[user]hi[a]"), len("hello world") + 1)
    assert answer.metadata == {"a": "b"}
    assert server.engine.submits[0].token_ids == encode("[user]hi[a]")
    assert server.engine.submits[0].params["max_tokens"] == 50


def test_a_response_names_every_field_of_a_tool(server: Served) -> None:
    short = {"type": "function", "name": "f"}
    answer = server.post("/v1/responses", {"input": "hi", "tools": [short]}).json()
    assert answer["tools"] == [{**short, "description": None, "parameters": None, "strict": None}]


def test_compaction_is_not_found(server: Served) -> None:
    answer = server.post("/v1/responses/compact", {"input": "hi"})
    assert (answer.status_code, "truncation: auto" in answer.json()["error"]["message"]) == (404, True)


def test_a_cut_response_is_incomplete(server: Served) -> None:
    answer = server.openai.responses.create(model=MODEL, input="hi", max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"


def test_events_are_numbered_and_join_to_the_response(server: Served) -> None:
    events = list(server.openai.responses.create(model=MODEL, input="hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "hello world"
    assert events[-1].response.output_text == "hello world"
    with server.openai.responses.stream(model=MODEL, input="hi") as stream:
        assert stream.get_final_response().output_text == "hello world"


def test_a_conversation_goes_on_from_a_stored_response(server: Served) -> None:
    first = server.openai.responses.create(model=MODEL, input="hi", instructions=None)
    second = server.openai.responses.create(model=MODEL, input="so", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert server.engine.submits[1].token_ids == encode("[user]hi[assistant]hello world[user]so[a]")
    assert server.openai.responses.retrieve(first.id).output_text == "hello world"
    items = server.openai.responses.input_items.list(second.id).data
    assert [item.type for item in items] == ["message", "message", "message"]
    server.openai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="it was not stored, or has been forgotten"):
        server.openai.responses.retrieve(first.id)


def test_a_response_that_is_not_stored_is_not_found(server: Served) -> None:
    answer = server.openai.responses.create(model=MODEL, input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.create(model=MODEL, input="so", previous_response_id=answer.id)
    with pytest.raises(openai.BadRequestError, match="background needs a stored response"):
        server.openai.responses.create(model=MODEL, input="hi", store=False, background=True)


def test_functions_are_called(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.context, "tool_format", DollarFormat())
    server.script(text=lambda submit, index: "ok$f$")
    answer = server.openai.responses.create(model=MODEL, input="hi", tools=[TOOL])
    message, call = answer.output
    assert (message.content[0].text, call.type, call.name, call.arguments) == ("ok", "function_call", "f", '{"a":1}')
    events = list(server.openai.responses.create(model=MODEL, input="hi", tools=[TOOL], stream=True))
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert (done.arguments, done.output_index) == ('{"a":1}', 1)


def test_reasoning_is_an_item_of_its_own(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.context, "reasoning_format", FORMATS["qwen3"])
    server.script(text=lambda submit, index: "<think>so</think>yes")
    answer = server.openai.responses.create(model=MODEL, input="hi")
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert (answer.output[0].content[0].text, answer.output_text) == ("so", "yes")
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    events = list(server.openai.responses.create(model=MODEL, input="hi", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "so"


def test_a_background_response_can_be_polled_followed_and_cancelled(server: Served) -> None:
    server.script(seconds=0.01)
    answer = server.openai.responses.create(model=MODEL, input="hi", background=True)
    assert answer.status in ("queued", "in_progress")
    ended = wait_for(lambda: (found := server.openai.responses.retrieve(answer.id)).status == "completed" and found)
    assert ended.output_text == "hello world"
    events = list(server.openai.responses.retrieve(answer.id, stream=True, starting_after=1))
    assert events[0].sequence_number == 2
    assert events[-1].type == "response.completed"
    server.script(num_tokens=2)  # then it stalls
    stalled = server.openai.responses.create(model=MODEL, input="hi", background=True)
    wait_for(lambda: server.engine.running)
    assert server.openai.responses.cancel(stalled.id).status == "cancelled"
    wait_for(lambda: server.engine.aborts)
    with pytest.raises(openai.BadRequestError, match="only background responses can be cancelled"):
        server.openai.responses.cancel(server.openai.responses.create(model=MODEL, input="hi", max_output_tokens=2).id)


def test_a_background_response_that_fails_says_why(server: Served) -> None:
    server.script(then="error", num_tokens=1)
    answer = server.openai.responses.create(model=MODEL, input="hi", background=True)
    failed = wait_for(lambda: (found := server.openai.responses.retrieve(answer.id)).status == "failed" and found)
    assert failed.error.code == "server_error"


def test_items_of_one_turn_become_one_message() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
    ]
    assert chat_messages("be brief", items) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "ok",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]


def test_options_have_their_names_of_the_chat_api() -> None:
    fields = {
        "input": "hi",
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "reasoning": {"effort": "low"},
        "include": ["message.output_text.logprobs"],
        "tools": [TOOL],
        "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
    }
    body = ResponsesRequest.model_validate_json(json.dumps(fields))
    chat = chat_request(body, input_items(body))
    assert chat.response_format.json_schema.schema_ == {"type": "object"}
    assert (chat.reasoning_effort, chat.logprobs) == ("low", True)
    assert chat.tool_choice["allowed_tools"]["tools"][0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": [{"type": "input_image"}]}, "has an item of type input_image"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "the model reads only text"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "this server runs no tools"),
        ({"input": "hi", "include": ["files"]}, "include has 'files'"),
        ({"input": "hi", "conversation": "c"}, "use previous_response_id"),
        ({"input": "hi", "text": {"format": {"type": "json_schema"}}}, "text.format has no schema"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(server: Served, fields: dict, message: str) -> None:
    answer = server.post("/v1/responses", {"model": MODEL, **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_the_oldest_turns_are_dropped_if_asked(server: Served) -> None:
    turns = [{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b" * 60}]
    items = [*turns, {"role": "user", "content": "hi"}]
    assert server.post("/v1/responses", {"input": items}).status_code == 400
    assert server.post("/v1/responses", {"input": items, "truncation": "auto"}).status_code == 200
    assert server.engine.submits[-1].token_ids == encode("[user]hi[a]")


def test_the_store_forgets_the_least_recently_used() -> None:
    store = ResponseStore(max_bytes=1000)
    for name in "abcd":
        store.put(StoredResponse({"id": name, "output": ["x" * 280]}, [], []))
        store.get("a") if name == "c" else None
    assert len(store) == 3
    assert [store.get(name).id for name in "acd"] == ["a", "c", "d"]
