"""The middleware: ids, metrics and the access log, without changing the messages."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ulysses_infer.config import Config
from ulysses_infer.server.observe import Observatory
from ulysses_infer.server.observe.middleware import HttpObserver


class Route:
    path = "/v1/models/{model}"


class Exchange:
    """An application that sends `messages`, called through the middleware as a server would."""

    def __init__(self, messages: list[dict[str, Any]], error: BaseException | None = None, leave: bool = False) -> None:
        self.messages, self.error, self.leave = messages, error, leave
        self.sent: list[dict[str, Any]] = []
        self.counted: list[tuple[str, str, int, float]] = []
        self.logged: list[dict[str, Any]] = []
        self.seen_id = ""

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = Route
        self.seen_id = scope["state"]["request_id"]
        if self.leave:
            assert (await receive())["type"] == "http.disconnect"
        for position, message in enumerate(self.messages):
            await send(message)
            assert len(self.sent) == position + 1, "a message was held back"
        if self.error:
            raise self.error

    def run(self, method: str = "GET", headers: list[tuple[bytes, bytes]] | None = None) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)

        observer = HttpObserver(self.app, lambda *fields: self.counted.append(fields), self.logged.append)
        scope = {"type": "http", "method": method, "path": "/v1/models/x", "headers": headers or []}
        asyncio.run(observer(scope, receive, send))

    @property
    def answered_id(self) -> str:
        return dict(self.sent[0]["headers"])[b"x-request-id"].decode()


def answer(*chunks: bytes, status: int = 200) -> list[dict[str, Any]]:
    bodies = [{"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks]
    return [{"type": "http.response.start", "status": status, "headers": []}, *bodies]


def test_a_stream_passes_chunk_by_chunk_and_is_logged_once_it_has_ended() -> None:
    exchange = Exchange(answer(b"data: 1\n\n", b"data: 22\n\n", b""))
    exchange.run()
    assert [message.get("body") for message in exchange.sent[1:]] == [b"data: 1\n\n", b"data: 22\n\n", b""]
    (fields,) = exchange.logged
    assert list(fields) == ["time", "request_id", "method", "route", "status", "seconds", "bytes"]
    assert (fields["method"], fields["route"], fields["status"], fields["bytes"]) == ("GET", Route.path, 200, 19)
    assert exchange.counted[0][:3] == ("GET", Route.path, 200)


@pytest.mark.parametrize("given", [b"abc", b"A.b_c-9", b"x" * 128])
def test_a_valid_request_id_is_kept(given: bytes) -> None:
    exchange = Exchange(answer())
    exchange.run(headers=[(b"X-Request-Id", given)])
    assert exchange.seen_id == exchange.answered_id == exchange.logged[0]["request_id"] == given.decode()


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"a b", b"a\nb", b"\xff\xfe", b'"}{', "ü".encode()])
def test_any_other_request_id_is_replaced(given: bytes) -> None:
    exchange = Exchange(answer())
    exchange.run(headers=[(b"x-request-id", given)])
    assert re.fullmatch("[0-9a-f]{32}", exchange.seen_id)
    assert exchange.answered_id == exchange.seen_id


def test_an_id_that_the_application_put_there_is_not_doubled() -> None:
    messages = answer()
    messages[0]["headers"] = [(b"X-Request-ID", b"mine"), (b"a", b"b")]
    exchange = Exchange(messages)
    exchange.run()
    assert [name for name, _ in exchange.sent[0]["headers"]] == [b"a", b"x-request-id"]


def test_an_error_goes_on_and_counts_as_500() -> None:
    exchange = Exchange([], error=RuntimeError("bug"))
    with pytest.raises(RuntimeError, match="bug"):
        exchange.run()
    assert exchange.counted[0][2] == 500


def test_a_client_that_left_before_its_answer_counts_as_499() -> None:
    exchange = Exchange([], leave=True)
    exchange.run()
    assert exchange.counted[0][2] == 499


def test_a_cancelled_stream_counts_with_the_status_it_began_with() -> None:
    exchange = Exchange(answer(b"data: 1\n\n"), error=asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        exchange.run()
    assert exchange.counted[0][2] == 200
    assert exchange.logged[0]["bytes"] == 9


def test_made_up_methods_and_unknown_routes_do_not_grow_the_metrics() -> None:
    observatory = Observatory(Config())

    async def nowhere(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404})
        await send({"type": "http.response.body", "body": b"no"})

    async def swallow(message: Any) -> None:
        pass

    app = observatory.middleware(nowhere)
    for number in range(50):
        scope = {"type": "http", "method": f"X{number}", "path": f"/{number}", "headers": []}
        asyncio.run(app(scope, swallow, swallow))  # type: ignore[arg-type]
    families = text_string_to_metric_families(observatory.metrics_text().decode())
    found = [sample for family in families for sample in family.samples if sample.name == "ulysses:http_requests_total"]
    assert [(sample.labels, sample.value) for sample in found] == [
        ({"method": "other", "route": "other", "status": "404"}, 50.0)
    ]


def test_other_kinds_of_connections_pass_untouched() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    observer = HttpObserver(app, lambda *fields: pytest.fail("counted"), None)
    asyncio.run(observer({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]


@pytest.mark.parametrize("wanted", [False, True])
def test_the_access_log_is_one_json_line_and_only_if_asked_for(wanted: bool, capsys: pytest.CaptureFixture) -> None:
    config = Config()
    config.server.access_log = wanted
    exchange = Exchange(answer(b"x"))
    app = Observatory(config).middleware(exchange.app)

    async def send(message: Any) -> None:
        exchange.sent.append(message)

    asyncio.run(app({"type": "http", "method": "GET", "path": "/", "headers": []}, send, send))  # type: ignore[arg-type]
    written = capsys.readouterr().err
    assert [json.loads(line)["status"] for line in written.splitlines()] == ([200] if wanted else [])
