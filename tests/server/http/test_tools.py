from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.server.http.harness import MODEL, Served
from ulysses_infer.server.http import tool_use
from ulysses_infer.server.tool_calls import FORMATS, ArgumentsDelta, CallStarted, ContentDelta, ToolEvent
from ulysses_infer.structured_outputs import StructuredOutputs

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]


class DollarParser:
    """Calls are written as `$f{…}$`."""

    def __init__(self) -> None:
        self._text, self._index = "", -1

    def push(self, text: str) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        for character in text:
            events += self._take(character)
        return events

    def _take(self, character: str) -> list[ToolEvent]:
        if character == "$":
            self._text = "" if self._text else "$"
            return []
        if not self._text:
            return [ContentDelta(character)]
        if self._text == "$":
            self._text, self._index = "$" + character, self._index + 1
            return [CallStarted(self._index, f"call-{self._index}", character)]
        return []

    def finish(self, is_cut: bool = False) -> list[ToolEvent]:
        return [ArgumentsDelta(index, '{"a":1}') for index in range(self._index + 1)]


@dataclass(frozen=True)
class DollarFormat:
    name: str = "dollar"
    tags: tuple[str, ...] = ("$",)
    is_bare: bool = False

    def parser(self, tools: Any) -> DollarParser:
        return DollarParser()


@pytest.fixture
def calling(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(server.context, "tool_format", DollarFormat())
    server.script(text=lambda submit, index: "ok$f$$g$", seconds=0.001)
    return server


def test_calls_are_found_in_a_whole_answer(calling: Served) -> None:
    answer = calling.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "ok"
    assert [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [
        ("call-0", "f", '{"a":1}'),
        ("call-1", "g", '{"a":1}'),
    ]
    assert "skip_special_tokens" not in calling.engine.submits[0].params


def test_an_answer_of_calls_alone_has_no_content(calling: Served) -> None:
    calling.script(text=lambda submit, index: "$f$")
    answer = calling.post("/v1/chat/completions", {"messages": USER, "tools": TOOLS}).json()
    assert answer["choices"][0]["message"]["content"] is None


def test_streamed_calls_join_to_those_of_a_whole_answer(calling: Served) -> None:
    calls: dict[int, dict] = {}
    content, reasons = "", []
    for chunk in calling.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or ():
            if call.id:
                calls[call.index] = {"id": call.id, "name": call.function.name, "arguments": ""}
            calls[call.index]["arguments"] += call.function.arguments
    assert content == "ok"
    assert [json.loads(call["arguments"]) for call in calls.values()] == [{"a": 1}, {"a": 1}]
    assert [call["name"] for call in calls.values()] == ["f", "g"]
    assert (set(reasons[:-1]), reasons[-1]) == ({None}, "tool_calls")


def test_one_call_is_kept_if_only_one_is_wanted(calling: Served) -> None:
    body = {"messages": USER, "tools": TOOLS, "parallel_tool_calls": False}
    message = calling.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"]


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
def test_without_tools_text_stays_text(calling: Served, fields: dict) -> None:
    choice = calling.post("/v1/chat/completions", {"messages": USER, **fields}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ok$f$$g$", "stop")


def test_a_call_cut_short_says_so(calling: Served) -> None:
    body = {"messages": USER, "tools": TOOLS, "max_tokens": 4}
    choice = calling.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "f"


def test_a_format_that_no_grammar_describes_excludes_tools(calling: Served) -> None:
    body = {"messages": USER, "tools": TOOLS, "response_format": {"type": "json_object"}}
    answer = calling.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
    body["tool_choice"] = "none"
    assert calling.post("/v1/chat/completions", body).status_code == 200


@pytest.fixture
def hermes(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A model that writes Hermes' tags as special tokens."""
    special = {"<tool_call>": [7], "</tool_call>": [8], "<|end|>": [9]}
    monkeypatch.setattr(server.context, "tool_format", FORMATS["hermes"])
    monkeypatch.setattr(server.context.texts.decoder, "special_texts", special, raising=False)
    return server


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
ANSWER = '{"answer": "<function"}'
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"answer": {"type": "string"}}}}}


@pytest.mark.parametrize(("text", "reason"), [(CALL, "tool_calls"), (ANSWER, "stop")])
@pytest.mark.parametrize(
    "wanted", [{"response_format": FORMAT}, {"structured_outputs": {"json_object": True}}], ids=str
)
def test_an_output_is_a_call_or_matches_the_format(hermes: Served, text: str, reason: str, wanted: dict) -> None:
    hermes.script(text=lambda submit, index: text)
    body = {"messages": USER, "tools": TOOLS, **wanted}
    choice = hermes.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == reason
    assert choice["message"]["content"] == (None if text is CALL else text)
    params = hermes.engine.submits[-1].params
    assert params["skip_special_tokens"] is False
    answer, call = json.loads(params["structured_outputs"]["alternatives"])
    assert list(answer[0]) == ["json"]
    assert call[0]["repeat"][0][0] == {"tokens": [7]}


def test_a_format_alone_or_a_demanded_call_alone(hermes: Served) -> None:
    hermes.script(text=lambda submit, index: ANSWER)
    for choice, kind in (("none", "answer"), ("required", "minItems")):
        body = {"messages": USER, "tools": TOOLS, "tool_choice": choice, "response_format": FORMAT}
        hermes.post("/v1/chat/completions", body)
        assert kind in hermes.engine.submits[-1].params["structured_outputs"]["json"]


def test_special_tokens_are_shown_only_on_request(hermes: Served) -> None:
    hermes.script(text=lambda submit, index: "a<tool_call>b<|end|>c")
    body = {"messages": USER, "tools": TOOLS}
    assert hermes.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == "abc"
    shown = hermes.post("/v1/chat/completions", {**body, "skip_special_tokens": False}).json()
    assert shown["choices"][0]["message"]["content"] == "a<tool_call>b<|end|>c"


def test_the_start_of_a_call_is_not_shown_if_the_output_is_cut(hermes: Served) -> None:
    hermes.script(text=lambda submit, index: CALL)
    choice = hermes.post("/v1/chat/completions", {"messages": USER, "tools": TOOLS, "max_tokens": 14}).json()[
        "choices"
    ][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert "tool_calls" not in choice["message"]


def test_an_unknown_function_is_refused(calling: Served) -> None:
    choice = {"type": "function", "function": {"name": "h"}}
    answer = calling.post("/v1/chat/completions", {"messages": USER, "tools": TOOLS, "tool_choice": choice})
    assert answer.status_code == 400
    assert "'h'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "f"}}, "stop")],
)
def test_a_demanded_call_is_forced_and_read_in_its_own_format(
    calling: Served, monkeypatch: pytest.MonkeyPatch, choice: Any, reason: str
) -> None:
    def forced(tools: Any, tool_choice: Any, parallel: bool) -> StructuredOutputs:
        return StructuredOutputs(regex=f"{len(tools)}{parallel}")

    monkeypatch.setattr(tool_use, "tool_choice_constraint", forced)
    monkeypatch.setattr(tool_use, "constrained_format", lambda tool_choice: DollarFormat())
    body = {"messages": USER, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    answer = calling.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["finish_reason"] == reason
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"
    assert calling.engine.submits[0].params == {"max_tokens": None, "structured_outputs": {"regex": "2False"}}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_the_prompt_and_the_constraint_have_only_the_allowed_tools(calling: Served) -> None:
    calling.post("/v1/chat/completions", {"messages": USER, "tools": TOOLS[:1]})
    calling.post("/v1/chat/completions", {"messages": USER, "tools": TOOLS, "tool_choice": allowed("f")})
    first, second = calling.engine.submits
    assert first.token_ids == second.token_ids
    calling.post(
        "/v1/chat/completions", {"messages": USER, "tools": TOOLS, "tool_choice": allowed("f", mode="required")}
    )
    constraint = calling.engine.submits[2].params["structured_outputs"]["json"]
    assert '"const":"f"' in constraint
    assert '"const":"g"' not in constraint


def test_an_allowed_tool_that_is_unknown_is_refused(calling: Served) -> None:
    answer = calling.post("/v1/chat/completions", {"messages": USER, "tools": TOOLS, "tool_choice": allowed("h")})
    assert answer.status_code == 400
    assert "names the function 'h', which is not in tools" in answer.json()["error"]["message"]
    broken = {"type": "allowed_tools", "allowed_tools": {"mode": "always"}}
    answer = calling.post("/v1/chat/completions", {"messages": USER, "tools": TOOLS, "tool_choice": broken})
    assert "needs allowed_tools with the mode auto or required" in answer.json()["error"]["message"]
