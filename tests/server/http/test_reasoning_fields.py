"""Reasoning in the chat API."""

from __future__ import annotations

import pytest

from tests.server.http.harness import MODEL, Served
from ulysses_infer.server.reasoning import FORMATS

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def thinking(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(server.context, "reasoning_format", FORMATS["qwen3"])
    server.script(text=lambda submit, index: "<think>so</think>yes")
    return server


def test_reasoning_is_apart_from_the_content_and_counted(thinking: Served) -> None:
    answer = thinking.openai.chat.completions.create(model=MODEL, messages=USER)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("yes", "so")
    total = len("<think>so</think>yes")
    assert answer.usage.completion_tokens == total + 1  # and the end of the sequence
    counted = answer.usage.completion_tokens_details.reasoning_tokens
    assert counted == len(">so</think")  # from the end of the opening tag to the closing one


def test_streamed_reasoning_joins_to_that_of_a_whole_answer(thinking: Served) -> None:
    stream = thinking.openai.chat.completions.create(model=MODEL, messages=USER, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "so"
    assert "".join(delta.content or "" for delta in deltas) == "yes"


def test_reasoning_can_be_left_out(thinking: Served) -> None:
    body = {"messages": USER, "include_reasoning": False}
    message = thinking.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["content"] == "yes"
    assert "reasoning_content" not in message


def test_a_response_format_constrains_what_follows_the_reasoning(thinking: Served) -> None:
    thinking.post("/v1/chat/completions", {"messages": USER, "response_format": {"type": "json_object"}})
    constraint = thinking.engine.submits[0].params["structured_outputs"]
    assert "</think>" in constraint["alternatives"]
    assert "json_object" not in constraint


def test_a_grammar_after_reasoning_is_refused(thinking: Served) -> None:
    answer = thinking.post("/v1/chat/completions", {"messages": USER, "guided_grammar": 'start: "a"'})
    assert answer.status_code == 400
    assert "a grammar cannot follow reasoning" in answer.json()["error"]["message"]
