"""Request fields of real clients: unknown ones, those that are missing, and those that an option allows."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from tests.server.http.harness import Served
from tests.tiny import encode
from ulysses_infer.config import ServerConfig
from ulysses_infer.server.http import body as body_module

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "a"}


@pytest.fixture
def settings(server: Served) -> ServerConfig:
    return server.context.config.server


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "_warned", set())


def post(server: Served, body: dict[str, Any]) -> tuple[int, Any]:
    answer = server.post("/v1/chat/completions" if "messages" in body else "/v1/completions", body)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("extra", "warning"),
    [
        ({"max_tokns": 2}, "unknown field 'max_tokns'; did you mean 'max_tokens'?"),
        ({"thinking": {"type": "enabled"}}, "unknown field 'thinking'; leave it out"),
        ({"stream": True, "stream_options": {"usage": True}}, "unknown field 'stream_options.usage'; leave it out"),
    ],
)
@pytest.mark.parametrize("body", [CHAT, TEXT])
def test_unknown_fields_are_ignored_with_one_warning_each(
    server: Served, caplog: pytest.LogCaptureFixture, body: dict, extra: dict, warning: str
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            answer = server.post("/v1/chat/completions" if body is CHAT else "/v1/completions", {**body, **extra})
            assert answer.status_code == 200, answer.text
    assert caplog.messages == [f"ignored in a request: {warning}"]


def test_an_unknown_field_deep_inside_is_ignored(server: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", "x": 1}, "y": [2]}
    messages = [*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": [call, call]}]
    assert post(server, {"messages": messages})[0] == 200


@pytest.mark.parametrize("mode", ["warn", "reject"])
def test_unknown_fields_that_are_null_are_ignored_silently(
    server: Served, settings: ServerConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    monkeypatch.setattr(settings, "unknown_fields", mode)
    assert post(server, {**CHAT, "functions": None, "thinking": None, "function_call": None})[0] == 200
    assert post(server, {**TEXT, "suffix": None, "use_beam_search": False})[0] == 200
    assert not [message for message in caplog.messages if "thinking" in message]


def test_unknown_fields_can_be_rejected(
    server: Served, settings: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "unknown_fields", "reject")
    status, answer = post(server, {**TEXT, "null": None, "max_tokns": 2})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unknown_field", "max_tokns")
    assert answer["error"]["message"] == "unknown field 'max_tokns'; did you mean 'max_tokens'?"
    assert post(server, {**CHAT, "echo": True})[1]["error"]["message"] == "unknown field 'echo'; leave it out"


def test_other_errors_beside_an_unknown_field_are_reported(server: Served) -> None:
    status, answer = post(server, {**TEXT, "thinking": True, "top_p": 0})
    assert (status, answer["error"]["param"]) == (400, "top_p")
    assert post(server, {"promt": "a"})[1]["error"]["message"] == "unknown field 'promt'; did you mean 'prompt'?"
    huge = server.http.post("/v1/completions", content='{"prompt": "a", "x": 1' + "0" * 5000 + "}")
    assert huge.status_code in (200, 400)


def test_administrative_bodies_stay_strict(server: Served) -> None:
    answer = server.http.post(
        "/admin/abort", json={"all": True, "al": 1}, headers={"Authorization": "Bearer admin-key"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_field")


def test_the_document_allows_what_the_server_ignores(server: Served) -> None:
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    assert "additionalProperties" not in schemas["ChatRequest"]
    assert schemas["AbortRequest"]["additionalProperties"] is False


def test_a_request_without_max_tokens_gets_the_servers(
    server: Served, settings: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(body: dict) -> int | None:
        assert post(server, body)[0] == 200
        params = server.engine.submits[-1].params
        return params.get("max_tokens", 16)

    assert (asked(CHAT), asked(TEXT)) == (None, 16)
    monkeypatch.setattr(settings, "default_max_tokens", 7)
    assert (asked(CHAT), asked(TEXT)) == (7, 7)
    assert (asked({**CHAT, "max_tokens": 9}), asked({**TEXT, "max_tokens": 9})) == (9, 9)


@pytest.mark.parametrize("body", [CHAT, TEXT, {"prompt": ["a", "bc"]}])
def test_greedy_outputs_are_equal_and_computed_once(server: Served, body: dict) -> None:
    server.script(text=lambda submit, index: f"output {index}")
    status, answer = post(server, {**body, "n": 3, "best_of": 3, "temperature": 0, "max_tokens": 50})
    assert status == 200
    num_prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    texts = [choice["message"]["content"] if body is CHAT else choice["text"] for choice in answer["choices"]]
    assert texts == ["output 0"] * 3 * num_prompts
    assert [choice["index"] for choice in answer["choices"]] == list(range(3 * num_prompts))
    assert answer["usage"]["completion_tokens"] == 3 * num_prompts * (len("output 0") + 1)
    assert all("n" not in submit.params for submit in server.engine.submits)


def test_greedy_outputs_are_streamed_alike(server: Served) -> None:
    answer = server.post("/v1/completions", {**TEXT, "n": 2, "temperature": 0, "stream": True, "logprobs": 1})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    texts = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == ["hello world"] * 2


def test_best_of_is_the_value_of_n_or_refused_by_name(server: Served) -> None:
    assert post(server, {**TEXT, "n": 2, "best_of": 2})[0] == 200
    assert post(server, {**CHAT, "best_of": 1})[0] == 200
    status, answer = post(server, {**TEXT, "n": 1, "best_of": 4})
    assert (status, answer["error"]["param"]) == (400, "best_of")
    assert answer["error"]["message"] == "best_of is 4, but outputs are not ranked; use n and choose yourself"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_request_may_bring_its_chat_template_if_the_option_allows_it(
    server: Served, settings: ServerConfig, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    body = {**CHAT, "chat_template": "{{ messages[0]['content'] }}!"}
    refused = server.post(path, body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template"
    assert "server.trust_request_chat_template" in refused.json()["error"]["message"]

    monkeypatch.setattr(settings, "trust_request_chat_template", True)
    answer = server.post(path, body)
    assert answer.status_code == 200
    written = answer.json()["tokens"] if path == "/tokenize" else server.engine.submits[0].token_ids
    assert written == encode("hi!")
    broken = server.post(path, {**CHAT, "chat_template": "{% for"})
    assert (broken.status_code, "chat template" in broken.json()["error"]["message"]) == (400, True)
    assert server.post(path, {**CHAT, "chat_template_kwargs": {"chat_template": "x"}}).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT), ("/v1/responses", {"input": "a", "store": False})],
)
def test_the_cache_key_goes_with_the_request(server: Served, path: str, body: dict) -> None:
    assert server.post(path, {**body, "prompt_cache_key": "key"}).status_code == 200
    assert server.post(path, body).status_code == 200
    assert [submit.cache_key for submit in server.engine.submits] == ["key", ""]
