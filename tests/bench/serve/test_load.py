"""The load client against a server with known delays and every kind of failure."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import ssl
import statistics
import subprocess
import time
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.bench.serve.fake_server import FakeServer, Script
from ulysses_infer.bench.serve.answer import StreamedAnswer
from ulysses_infer.bench.serve.client import Client, Server
from ulysses_infer.bench.serve.load import LoadRequest, LoadRun, closed_loop, open_loop
from ulysses_infer.bench.serve.serve_bench import event_loop_factory
from ulysses_infer.errors import ConfigError, RequestError

PATH, CHAT = "/v1/completions", "/v1/chat/completions"


def body(max_tokens: int = 4) -> bytes:
    return json.dumps({"prompt": [1, 2, 3], "max_tokens": max_tokens}).encode()


def run(work: Coroutine[Any, Any, Any], uvloop: bool = True) -> Any:
    with asyncio.Runner(loop_factory=event_loop_factory() if uvloop else None) as runner:
        return runner.run(work)


async def ask(server: FakeServer, count: int = 1, path: str = PATH, gap: float = 0.0, **options: Any) -> LoadRun:
    client = Client(Server.of(server.url, timeout=options.pop("timeout", 5.0)))
    try:
        return await open_loop(client, path, [LoadRequest(body(), number * gap) for number in range(count)], **options)
    finally:
        client.close()


@pytest.mark.parametrize("path", [PATH, CHAT])
@pytest.mark.parametrize("uvloop", [True, False])
def test_known_delays_are_measured_within_two_milliseconds(path: str, uvloop: bool) -> None:
    async def work() -> tuple[LoadRun, FakeServer]:
        async with FakeServer(Script(first=0.05, gap=0.02)) as server:
            return await ask(server, 8, path, gap=0.06), server

    done, server = run(work(), uvloop)
    errors = []
    for answer, arrived, tokens in zip(done.answers, server.moments, server.tokens, strict=True):
        assert answer.error is None
        assert answer.ttft >= 0.05
        assert answer.tpot == pytest.approx(statistics.fmean(answer.gaps))
        wanted = [later - earlier for earlier, later in pairwise([arrived, *tokens])]
        errors += [abs(got - want) for got, want in zip([answer.ttft, *answer.gaps], wanted, strict=True)]
    assert statistics.median(errors) < 0.002  # on a shared machine some requests wait for a core


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("no finish_reason", "without a finish_reason"),
        ("no [DONE]", r"without \[DONE\]"),
        ("cut", "closed in the middle"),
        ("error event", "rank 1 died"),
        ("abort", "finish_reason 'abort'"),
        ("503", "HTTP 503: the queue is full"),
        ("junk", "not HTTP"),
        ("silence", "before any answer"),
    ],
)
def test_lost_stream_is_a_failure_with_its_reason(ending: str, words: str) -> None:
    async def work() -> LoadRun:
        async with FakeServer(Script(ending=ending)) as server:
            return await ask(server, 3)

    answers = run(work()).answers
    assert len(answers) == 3
    for answer in answers:
        assert answer.error is not None
        assert re.search(words, answer.error)


def test_unreachable_server_is_a_failure() -> None:
    async def work() -> LoadRun:
        async with FakeServer() as server:
            url = server.url
        gone = FakeServer(url=url)
        return await ask(gone)

    (answer,) = run(work()).answers
    assert answer.error is not None
    assert "Error" in answer.error


def test_answer_that_never_ends_is_lost_after_the_timeout() -> None:
    async def work() -> LoadRun:
        async with FakeServer(Script(first=30.0)) as server:
            return await ask(server, timeout=0.1)

    (answer,) = run(work()).answers
    assert answer.error == "no end within 0.1 s"


def test_tokens_are_counted_where_the_server_does_not_report_them() -> None:
    async def work() -> LoadRun:
        async with FakeServer(Script(has_usage=False)) as server:
            return await ask(server)

    assert run(work()).answers[0].output_tokens == 4


def test_requests_are_sent_at_absolute_times_regardless_of_earlier_ones() -> None:
    async def work() -> tuple[LoadRun, list[float]]:
        async with FakeServer(Script(first=0.3)) as server:
            asyncio.get_running_loop().call_later(0.1, time.sleep, 0.1)
            return await ask(server, 40, gap=0.01), server.moments

    done, moments = run(work())
    scheduled = [done.started + 0.01 * number for number in range(40)]
    late = [moment - due for moment, due in zip(moments, scheduled, strict=True)]
    assert [answer.scheduled for answer in done.answers] == scheduled
    assert min(late) >= 0
    assert max(late) > 0.05
    assert min(late[-10:]) < 0.03  # the delay was made up for


def test_limit_of_requests_in_flight_holds_later_ones_back_without_blaming_the_client() -> None:
    async def work() -> LoadRun:
        async with FakeServer(Script(first=0.05)) as server:
            return await ask(server, 6, max_concurrency=2)

    answers = run(work()).answers
    assert [answer.due > answer.scheduled for answer in answers] == [False, False, True, True, True, True]
    ends = {answer.ended for answer in answers}
    assert all(answer.due in ends for answer in answers[2:])
    for moment in (answer.sent for answer in answers):
        assert sum(answer.sent <= moment < answer.ended for answer in answers) <= 2


def test_lateness_of_a_slow_client_is_measured() -> None:
    async def work() -> LoadRun:
        async with FakeServer() as server:
            asyncio.get_running_loop().call_later(0.1, time.sleep, 0.2)
            return await ask(server, 4, gap=0.06)

    done = run(work())
    assert max(answer.lateness for answer in done.answers) > 0.1
    assert max(done.loop_lags) > 0.1


def test_closed_loop_keeps_the_given_number_in_flight_for_the_duration() -> None:
    async def work() -> tuple[LoadRun, int]:
        async with FakeServer(Script(first=0.02)) as server:
            client = Client(Server.of(server.url))
            done = await closed_loop(client, PATH, itertools.repeat(body(1)), 3, seconds=0.3)
            client.close()
            return done, server.num_connections

    done, num_connections = run(work())
    assert 6 <= len(done.answers) <= 48
    assert all(answer.error is None for answer in done.answers)
    assert done.seconds >= 0.3
    assert num_connections == done.num_connections == 3  # kept


def test_closed_loop_ends_with_the_work() -> None:
    async def work() -> LoadRun:
        async with FakeServer() as server:
            client = Client(Server.of(server.url))
            return await closed_loop(client, PATH, iter([body()] * 5), 2)

    assert len(run(work()).answers) == 5


def test_connection_that_was_closed_while_idle_costs_nothing() -> None:
    async def work() -> list[StreamedAnswer]:
        async with FakeServer(drops_idle=True) as server:
            client = Client(Server.of(server.url))
            done = await closed_loop(client, PATH, iter([body()] * 20), 1)
            return done.answers

    assert all(answer.error is None for answer in run(work()))


def test_requests_carry_the_api_key_and_headers() -> None:
    async def work() -> list[str]:
        async with FakeServer() as fake:
            server = Server.of(fake.url + "/v1/", api_key="secret", headers={"X-Team": "blue"})
            await Client(server).call("GET", "/v1/models")
            return fake.heads

    (head,) = run(work())
    assert head.startswith("GET /v1/models HTTP/1.1\r\n")
    assert "Authorization: Bearer secret\r\n" in head
    assert "X-Team: blue\r\n" in head


def test_refused_call_says_why() -> None:
    async def work() -> None:
        async with FakeServer() as fake:
            await Client(Server.of(fake.url)).call("GET", "/nothing")

    with pytest.raises(RequestError, match="HTTP 404: there is no such page"):
        run(work())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://x:99999"])
def test_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        Server.of(url)


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix"),
    [
        ("http://a", "a", 80, ""),
        ("https://a/", "a", 443, ""),
        ("http://[::1]:9/v1", "::1", 9, ""),
        ("http://a:1/openai/v1/", "a", 1, "/openai"),
    ],
)
def test_url_may_have_a_path(url: str, host: str, port: int, prefix: str) -> None:
    server = Server.of(url)

    assert (server.host, server.port, server.prefix) == (host, port, prefix)
    assert (server.tls is not None) == url.startswith("https")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https_works_with_a_certificate_that_is_trusted(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-keyout",
            key,
            "-out",
            certificate,
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def work() -> tuple[LoadRun, LoadRun]:
        async with FakeServer(tls=context) as server:
            trusting = Client(Server.of(server.url, ca_file=str(certificate)))
            good = await closed_loop(trusting, PATH, iter([body()] * 4), 2)
            trusting.close()
            wary = await closed_loop(Client(Server.of(server.url)), PATH, iter([body()]), 1)
            return good, wary

    good, wary = run(work())
    assert [answer.error for answer in good.answers] == [None] * 4
    assert "certificate verify failed" in (wary.answers[0].error or "")


def test_certificates_that_cannot_be_read_are_reported() -> None:
    with pytest.raises(ConfigError, match="--ca-file 'none'"):
        Server.of("https://x", ca_file="none")
