"""Every failure is reported to the client and leaves nothing running."""

from __future__ import annotations

import json
import socket

import httpx
import openai
import pytest

from tests.server.fake_engine import READY
from tests.server.http.harness import MODEL, Served, served, wait_for
from ulysses_infer.errors import RequestError
from ulysses_infer.server.http.texts import Texts

BODY = {"prompt": "abc", "max_tokens": 20}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def stream_lines(server: Served, body: dict) -> list[str]:
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}, timeout=10) as answer:
        assert answer.status_code == 200
        return [line.removeprefix("data: ") for line in answer.iter_lines() if line]


# -- refusals and deaths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "error"),
    [("invalid", 400, None), ("overloaded", 503, "overloaded"), ("internal", 500, "internal_error")],
)
def test_refusals_of_the_engine_have_a_status(
    server: Served, kind: str, status: int, error: str | None, streams: bool
) -> None:
    server.script(refusal=("no", kind))
    answer = server.post("/v1/completions", {**BODY, "stream": streams})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == error
    assert ("retry-after" in answer.headers) == (status == 503)


def test_one_refused_prompt_ends_the_others(server: Served) -> None:
    server.script(num_tokens=1)
    answer = server.post("/v1/completions", {"prompt": ["a", "b" * 200, "c"]})
    assert answer.status_code == 400
    wait_for(lambda: len(server.engine.aborts) == 2)
    wait_for(lambda: not server.engine.running)


def test_an_output_that_cannot_be_computed_is_500(server: Served) -> None:
    server.script(num_tokens=2, then="error")
    answer = server.post("/v1/completions", BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "computation_failed")


def test_an_error_in_a_stream_is_an_event_and_then_done(server: Served) -> None:
    server.script(num_tokens=2, then="error", seconds=0.01)
    *_, error, done = stream_lines(server, BODY)
    assert json.loads(error)["error"]["code"] == "computation_failed"
    assert done == "[DONE]"


def test_an_administrators_abort_returns_the_partial_output(server: Served) -> None:
    server.script(num_tokens=2, then="abort")
    choice = server.post("/v1/completions", BODY).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("he", "abort")


def test_a_dead_engine_is_reported_to_waiting_and_to_new_requests(texts: Texts) -> None:
    with served(texts) as server:
        server.script(num_tokens=2, then="die", seconds=0.01)
        *_, error, done = stream_lines(server, BODY)
        assert json.loads(error)["error"]["code"] == "engine_dead"
        assert "rank 1 was killed" in json.loads(error)["error"]["message"]
        assert done == "[DONE]"
        health = server.get("/health")
        died = {"status": "dead", "reason": "rank 1 was killed", "dead_replicas": []}
        assert (health.status_code, health.json()) == (503, died)
        for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "a"})):
            assert server.post(path, body).status_code == 503
        assert server.get("/v1/models").status_code == 200


def test_the_client_raises_for_an_error_in_a_stream(texts: Texts) -> None:
    with served(texts) as server:
        server.script(num_tokens=2, then="die", seconds=0.01)
        with pytest.raises(openai.APIError, match="rank 1 was killed"):
            list(server.openai.completions.create(model=MODEL, prompt="a", stream=True))


def test_an_engine_that_hangs_up_is_dead(texts: Texts) -> None:
    with served(texts) as server:
        server.script(num_tokens=0)
        server.call_soon(server.engine.hang_up)
        wait_for(lambda: server.get("/health").status_code == 503)
        assert server.post("/v1/completions", BODY).status_code == 503


def test_during_the_start_nothing_is_served_and_probes_report_it(texts: Texts) -> None:
    with served(texts, is_ready=False) as server:
        assert server.get("/health").status_code == server.get("/ready").status_code == 503
        assert server.get("/health").json()["status"] == "starting"
        answer = server.post("/v1/completions", BODY)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert server.get("/v1/models").json()["data"][0]["max_model_len"] is None
        server.call_soon(lambda: server.engine.send(READY))
        wait_for(lambda: server.get("/ready").status_code == 200)
        assert server.post("/v1/completions", BODY).status_code == 200


def test_a_server_that_drains_is_healthy_but_not_ready(texts: Texts) -> None:
    with served(texts) as server:
        server.script(num_tokens=3)
        with server.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as running:
            lines = running.iter_lines()
            assert next(lines).startswith("data: ")
            server.call_soon(server.engine.drain)
            wait_for(lambda: server.get("/ready").status_code == 503)
            assert server.get("/health").status_code == 200
            assert server.post("/v1/completions", BODY).status_code == 503
            assert not server.engine.said_goodbye
        wait_for(lambda: server.engine.said_goodbye)


def test_a_request_that_takes_too_long_is_ended(texts: Texts) -> None:
    with served(texts, request_timeout=0.2) as server:
        server.script(num_tokens=2)
        answer = server.post("/v1/completions", BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
        *_, error, done = stream_lines(server, BODY)
        assert json.loads(error)["error"]["code"] == "request_timeout"
        assert done == "[DONE]"
        server.script(num_tokens=0)
        assert server.post("/v1/completions", {**BODY, "stream": True}).status_code == 504
        wait_for(lambda: len(server.engine.aborts) == 3)


# -- clients that leave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_client_that_leaves_aborts_its_request(server: Served, path: str, streams: bool, num_tokens: int) -> None:
    server.script(num_tokens=num_tokens)
    body = {"stream": streams, **(CHAT if "chat" in path else BODY)}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(path, json=body, timeout=0.15)
    wait_for(lambda: server.engine.aborts == [server.engine.submits[0].request_id], seconds=1)
    wait_for(lambda: not server.engine.running and not server.context.running)


def test_leaving_aborts_every_prompt_that_has_not_ended(server: Served) -> None:
    server.script(num_tokens=1)
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json={"prompt": ["a", "b", "c"]}, timeout=0.15)
    wait_for(lambda: len(server.engine.aborts) == 3, seconds=1)


def test_leaving_in_the_middle_of_a_fast_stream_aborts(server: Served) -> None:
    server.script(text=lambda submit, index: "x" * 100, seconds=0.01)
    with server.openai.completions.create(model=MODEL, prompt="a", max_tokens=100, stream=True) as stream:
        next(iter(stream))
    wait_for(lambda: len(server.engine.aborts) == 1, seconds=1)


def test_a_client_that_leaves_before_its_body_is_complete_costs_nothing(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
    assert server.post("/v1/completions", BODY).status_code == 200
    assert server.engine.aborts == []


# -- invalid requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_not_an_object_is_400(server: Served, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = server.http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_of_another_type_is_415(server: Served) -> None:
    answer = server.http.post("/v1/completions", data={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")


def test_unknown_routes_and_methods_are_answered_in_the_same_shape(server: Served) -> None:
    answer = server.get("/v1/images/generations")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
    answer = server.get("/v1/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_a_large_body_is_413_whether_declared_or_not(texts: Texts) -> None:
    with served(texts, max_body_bytes=1000) as server:
        headers = {"Content-Type": "application/json"}
        for content in (b" " * 1001, iter([b" " * 600, b" " * 600])):
            answer = server.http.post("/v1/completions", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
            assert answer.headers["connection"] == "close"
        assert server.post("/v1/completions", BODY).status_code == 200


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"\x00" * 1000,
    ],
)
def test_junk_does_not_affect_other_requests(server: Served, junk: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=1) as connection:
        connection.sendall(junk)
        try:
            reply = connection.recv(100)
        except (TimeoutError, ConnectionError):
            reply = b""
    assert not reply.startswith(b"HTTP/1.1 5")
    assert server.post("/v1/completions", BODY).status_code == 200


def test_a_bug_is_500_in_the_same_shape(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seconds: float, since: float | None = None) -> dict:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(server.context.observatory, "snapshot", broken)
    answer = server.get("/dashboard/data")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "x-request-id" in answer.headers


def test_a_commands_refusal_is_400(server: Served) -> None:
    server.engine.replies["reset_prefix_cache"] = RequestError("requests are running")
    answer = server.post("/admin/reset_prefix_cache", None, headers={"Authorization": "Bearer admin-key"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "requests are running")


def test_a_client_that_does_not_read_delays_no_other(server: Served) -> None:
    server.script(text=lambda submit, index: "x" * 120, seconds=0.001)
    body = json.dumps({"prompt": ["a"] * 64, "n": 8, "max_tokens": 120, "logprobs": 20, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", server.port)) as deaf:
        deaf.sendall(head + body)
        wait_for(lambda: server.context.running)
        server.script()
        assert server.post("/v1/completions", BODY).status_code == 200
    wait_for(lambda: not server.context.running, seconds=10)
