from __future__ import annotations

import json

import pytest

from tests.server.http.harness import MODEL, Served
from tests.tiny import EOS, encode

USER = [{"role": "user", "content": "hi"}]


def test_an_answer_has_the_shape_that_the_client_expects(server: Served) -> None:
    answer = server.openai.chat.completions.create(model=MODEL, messages=USER)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "hello world")
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len("[user]hi[a]")
    assert server.engine.submits[0].token_ids == encode("[user]hi[a]")
    assert server.engine.submits[0].params == {"max_tokens": None}


def test_fields_that_are_empty_are_null_not_absent(server: Served) -> None:
    choice = server.post("/v1/chat/completions", {"messages": USER}).json()["choices"][0]
    assert choice["logprobs"] is None
    assert choice["message"]["refusal"] is None
    assert choice["message"]["annotations"] == []
    assert choice["stop_reason"] is None


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_length_limit_hold(server: Served, name: str) -> None:
    answer = server.post("/v1/chat/completions", {"messages": USER, name: 3}).json()
    assert answer["choices"][0]["message"]["content"] == "hel"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_parts_of_text_are_joined(server: Served) -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 200
    assert len(server.engine.submits[0].token_ids) == len("[user]a b[a]")  # the line break is no token of this model


def test_an_image_is_refused_by_name(server: Served) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:"}}]
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400
    assert "messages[0].content has a part of type image_url; the model reads only text" in answer.text


def test_messages_that_the_template_refuses_are_a_client_error(server: Served) -> None:
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "developer", "content": "be nice"}]})
    assert answer.status_code == 400
    assert "no system role" in answer.json()["error"]["message"]


def test_the_last_message_can_be_continued(server: Served) -> None:
    messages = [*USER, {"role": "assistant", "content": "yes, "}]
    answer = server.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True})
    assert answer.status_code == 200
    assert server.engine.submits[0].token_ids == encode("[user]hi[assistant]yes, ")


def test_past_tool_calls_are_objects_to_the_template(server: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    answer = server.post("/v1/chat/completions", {"messages": messages})
    assert answer.status_code == 200
    assert server.engine.submits[0].token_ids == encode("[user]hi[assistant][tool]ok[a]")


def test_logprobs_have_the_chat_format(server: Served) -> None:
    answer = server.openai.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=2, max_tokens=2
    )
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("h", -2.5, [104])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [(" ", -1.5), ("h", -2.5)]
    assert len(answer.choices[0].logprobs.content) == 2


def events(server: Served, **body: object) -> list[str]:
    with server.http.stream("POST", "/v1/chat/completions", json={"messages": USER, **body}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]


def test_a_stream_opens_with_the_role_and_ends_with_reason_usage_and_done(server: Served) -> None:
    server.script(seconds=0.002)
    *chunks, done = events(server, stream=True, stream_options={"include_usage": True})
    assert done == "[DONE]"
    first, *middle, last, usage = [json.loads(chunk) for chunk in chunks]
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
    assert last["choices"][0]["finish_reason"] == "stop"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in [*middle, last])
    assert text == "hello world"
    assert all(chunk["usage"] is None for chunk in [first, *middle, last])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert len({chunk["id"] for chunk in [first, last, usage]}) == 1
    assert {chunk["object"] for chunk in [first, last, usage]} == {"chat.completion.chunk"}


def test_without_the_option_a_stream_has_no_usage(server: Served) -> None:
    *chunks, _ = events(server, stream=True)
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


def test_usage_can_come_with_every_chunk(server: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events(server, stream=True, stream_options=options)
    assert all(json.loads(chunk)["usage"]["prompt_tokens"] == 11 for chunk in chunks)


def test_tokens_that_came_together_go_in_one_chunk(server: Served) -> None:
    *chunks, _ = events(server, stream=True)
    assert len(chunks) < len("hello world")


def test_the_client_reads_a_stream(server: Served) -> None:
    server.script(text=lambda submit, index: f"answer {index}", seconds=0.001)
    texts = {0: "", 1: ""}
    stream = server.openai.chat.completions.create(
        model=MODEL, messages=USER, n=2, stream=True, logprobs=True, stream_options={"include_usage": True}
    )
    num_scored = 0
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            num_scored += len(choice.logprobs.content) if choice.logprobs else 0
        usage = chunk.usage
    assert texts == {0: "answer 0", 1: "answer 1"}
    assert num_scored == usage.completion_tokens == 2 * 9


def test_a_stream_ends_before_its_stop_string(server: Served) -> None:
    server.script(seconds=0.001)
    *chunks, _ = events(server, stream=True, stop=["o w"])
    texts = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "hell"
    assert json.loads(chunks[-1])["choices"][0]["stop_reason"] == "o w"


def test_token_ids_are_streamed_on_request(server: Served) -> None:
    *chunks, _ = events(server, stream=True, return_token_ids=True)
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == encode("[user]hi[a]")
    assert [token for choice in choices for token in choice.get("token_ids", [])] == [*encode("hello world"), EOS]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages is missing"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages should be a valid array"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content should be a text"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"messages": USER, "max_tokens": 1, "max_completion_tokens": 2}, "they mean the same"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens is 0"),
        ({"messages": USER, "functions": [{"name": "f"}]}, "functions is not available; use tools"),
        ({"messages": USER, "n": 2, "best_of": 3}, "best_of is 3"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools[0]"),
        ({"messages": USER, "tool_choice": "required"}, "there are no tools"),
        (
            {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
            "exclude each other",
        ),
        ({"messages": USER, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs has 'tokenize'"),
    ],
)
def test_a_wrong_request_is_400_in_one_line(server: Served, body: dict, words: str) -> None:
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert "\n" not in message


def test_fields_of_openai_without_a_meaning_here_are_accepted(server: Served) -> None:
    server.openai.chat.completions.create(
        model=MODEL,
        messages=USER,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        verbosity="low",
        reasoning_effort="low",
        prompt_cache_key="k",
        safety_identifier="s",
        modalities=["text"],
    )
    assert len(server.engine.submits) == 1
