"""Anthropic's API, used through Anthropic's client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import pytest

from tests.server.http.harness import MODEL, Served
from tests.server.http.test_tools import DollarFormat
from tests.tiny import encode
from ulysses_infer.server.reasoning import FORMATS

USER = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "description": "a tool", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture
def client(server: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_has_blocks_a_reason_and_usage(client: anthropic.Anthropic, server: Served) -> None:
    answer = client.messages.create(model=MODEL, max_tokens=50, messages=USER)
    assert [(block.type, block.text) for block in answer.content] == [("text", "hello world")]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len("[user]hi[a]"), len("hello world") + 1)
    assert server.engine.submits[0].token_ids == encode("[user]hi[a]")
    assert server.engine.submits[0].params["max_tokens"] == 50


def test_a_message_has_every_field_that_the_api_requires(server: Served) -> None:
    answer = server.post("/v1/messages", {"model": MODEL, "max_tokens": 50, "messages": USER}).json()
    nulls = ("stop_sequence", "stop_details", "container")
    assert [answer[name] for name in nulls] == [None] * len(nulls)
    assert answer["content"][0]["citations"] is None
    usage = answer["usage"]
    assert (usage["output_tokens_details"], usage["service_tier"]) == ({"thinking_tokens": 0}, "standard")
    assert [usage[name] for name in ("cache_creation", "inference_geo", "server_tool_use")] == [None] * 3


def test_cached_tokens_are_not_counted_as_input(client: anthropic.Anthropic, server: Served) -> None:
    server.script(num_cached_tokens=4)
    usage = client.messages.create(model=MODEL, max_tokens=5, messages=USER).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (len("[user]hi[a]") - 4, 4)


def test_the_limit_and_stop_sequences_are_named_as_reasons(client: anthropic.Anthropic, server: Served) -> None:
    assert client.messages.create(model=MODEL, max_tokens=3, messages=USER).stop_reason == "max_tokens"
    sampling = {"temperature": 0.5, "top_k": 3}
    client.messages.create(model=MODEL, max_tokens=9, messages=USER, stop_sequences=["wo"], extra_body=sampling)
    params = server.engine.submits[1].params
    assert (params["stop"], params["temperature"], params["top_k"]) == (["wo"], 0.5, 3)


def test_the_end_of_text_can_be_ignored(client: anthropic.Anthropic, server: Served) -> None:
    for extra in (None, {"ignore_eos": True}):
        client.messages.create(model=MODEL, max_tokens=5, messages=USER, extra_body=extra)
    assert [submit.params.get("ignore_eos", False) for submit in server.engine.submits] == [False, True]


def test_a_stream_joins_to_the_whole_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=50, messages=USER) as stream:
        assert "".join(stream.text_stream) == "hello world"
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == ("hello world", "end_turn")
    assert final.usage.output_tokens == len("hello world") + 1


def test_events_come_in_the_documented_order(server: Served) -> None:
    body = {"model": MODEL, "max_tokens": 2, "messages": USER, "stream": True}
    text = server.post("/v1/messages", body).text
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}


def test_tools_are_used(client: anthropic.Anthropic, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.context, "tool_format", DollarFormat())
    server.script(text=lambda submit, index: "ok$f$")
    answer = client.messages.create(model=MODEL, max_tokens=50, messages=USER, tools=[TOOL])
    assert answer.stop_reason == "tool_use"
    text, use = answer.content
    assert (text.text, use.name, use.input, use.id) == ("ok", "f", {"a": 1}, "call-0")
    assert use.caller.type == "direct"
    with client.messages.stream(model=MODEL, max_tokens=50, messages=USER, tools=[TOOL]) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].input == {"a": 1}


def test_thinking_is_a_block_of_its_own(
    client: anthropic.Anthropic, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.context, "reasoning_format", FORMATS["qwen3"])
    server.script(text=lambda submit, index: "<think>so</think>yes")
    with client.messages.stream(model=MODEL, max_tokens=50, messages=USER) as stream:
        final = stream.get_final_message()
    whole = client.messages.create(model=MODEL, max_tokens=50, messages=USER)
    for message in (final, whole):
        thinking, text = message.content
        assert (thinking.type, thinking.thinking, text.text) == ("thinking", "so", "yes")


def test_a_history_with_tools_becomes_chat_messages(server: Served) -> None:
    from ulysses_infer.server.http.messages.request import chat_request
    from ulysses_infer.server.http.protocol.messages import MessagesRequest

    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]}
    body = {
        "model": MODEL,
        "max_tokens": 5,
        "system": [{"type": "text", "text": "be brief"}],
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
            {"role": "assistant", "content": "It is"},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled"},
    }
    chat = chat_request(MessagesRequest.model_validate_json(json.dumps(body)))
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "tool", "user", "assistant"]
    assert chat.messages[2].reasoning_content == "hm"
    assert chat.messages[2].tool_calls[0].function.arguments == '{"a": 1}'
    assert (chat.messages[3].tool_call_id, chat.messages[3].content) == ("t1", "7")
    assert chat.continue_final_message is True
    assert chat.parallel_tool_calls is False
    assert chat.tool_choice == {"type": "function", "function": {"name": "f"}}
    assert chat.chat_template_kwargs == {"enable_thinking": False, "thinking": False}


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model=MODEL, messages=USER).input_tokens == len("[user]hi[a]")


def test_errors_have_the_shape_of_the_api(client: anthropic.Anthropic, server: Served) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nobody", max_tokens=5, messages=USER)
    assert missing.value.body["error"]["type"] == "not_found_error"
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match="a block of type image; the model reads text"):
        client.messages.create(model=MODEL, max_tokens=5, messages=image)
    server.script(then="error", num_tokens=1)
    body = {"model": MODEL, "max_tokens": 5, "messages": USER, "stream": True}
    last = server.post("/v1/messages", body).text.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["type"] == "error"
