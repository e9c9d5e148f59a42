"""Token ids in, token ids out, and prompts that are cut to fit."""

from __future__ import annotations

import json

import pytest

from tests.server.fake_engine import MAX_MODEL_LEN
from tests.server.http.harness import Served
from tests.tiny import EOS, encode

PROMPT = encode("hi")


def test_tokens_are_continued_with_tokens(server: Served) -> None:
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 20, "seed": 3}, "request_id": "mine"}
    answer = server.post("/inference/v1/generate", body).json()
    assert answer["request_id"] == "mine"
    assert [choice["token_ids"] for choice in answer["choices"]] == [[*encode("hello world"), EOS]]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert server.engine.submits[0].token_ids == PROMPT
    assert server.engine.submits[0].params == {"max_tokens": 20, "seed": 3}


def test_streamed_tokens_join_to_the_whole_output(server: Served) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    text = server.post("/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": {"n": 2}, **options}).text
    *lines, last = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert last == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    for index in (0, 1):
        tokens = [t for chunk in chunks for c in chunk["choices"] if c["index"] == index for t in c["token_ids"]]
        assert tokens == [*encode("hello world"), EOS]
    assert chunks[-1]["usage"]["prompt_tokens"] == len(PROMPT)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"token_ids": [10**6]}, "outside the vocabulary"),
        ({"token_ids": PROMPT, "sampling_params": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"token_ids": []}, "token_ids"),
    ],
)
def test_wrong_requests_are_refused(server: Served, body: dict, message: str) -> None:
    answer = server.post("/inference/v1/generate", body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_only_the_last_tokens_of_a_prompt_are_kept(server: Served, path: str) -> None:
    text = "a" * 200
    body = {"prompt": text} if path.endswith("/v1/completions") else {"messages": [{"role": "user", "content": text}]}
    assert server.post(path, {**body, "truncate_prompt_tokens": 5, "max_tokens": 3}).status_code == 200
    assert len(server.engine.submits[-1].token_ids) == 5
    assert server.post(path, {**body, "truncate_prompt_tokens": -1, "max_tokens": 3}).status_code == 200
    assert len(server.engine.submits[-1].token_ids) == MAX_MODEL_LEN - 3


def test_the_load_and_the_configuration_can_be_read(server: Served) -> None:
    assert server.get("/load").json() == {"server_load": 0}
    info = server.get("/server_info").json()
    assert info["config"]["server"]["admin_api_key"] == "(hidden)"
    assert info["model"]["max_model_len"] == MAX_MODEL_LEN
    assert server.get("/ping").status_code == server.http.post("/ping").status_code == 200


def test_the_page_of_the_api_needs_no_other_host(server: Served) -> None:
    page = server.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    script = page.split('script src="')[1].split('"')[0]
    assert len(server.get(script).content) > 100_000
