"""Random request bodies, passed directly to the application: always an answer, and never a 5xx."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from tests.server.http.harness import connect
from ulysses_infer.server.http.app import make_app
from ulysses_infer.server.http.protocol.chat import ChatRequest
from ulysses_infer.server.http.protocol.completions import CompletionRequest
from ulysses_infer.server.http.protocol.tokens import DetokenizeRequest, TokenizeRequest
from ulysses_infer.server.http.texts import Texts

ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    17,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**40,
    0.5,
    -0.0,
    1e308,
    1e-300,
    "",
    "a",
    "stop",
    "null",
    "é\u2028😀",
    "\x00",
    "x" * 300,
    [],
    [[]],
    [0],
    [5, 6],
    [[5], [6]],
    ["a", "b"],
    [None],
    [1e5],
    {},
    {"a": 1},
    {"type": "json_object"},
    {"type": "text"},
    {"json": {}},
    {"5": 1.5},
    {"include_usage": True},
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "t"}]}],
    [{"role": "tool", "content": None}],
    [{"type": "function", "function": {"name": "f"}}],
    "auto",
    "required",
]
ROUTES = {
    "/v1/completions": (CompletionRequest, {"prompt": "abc", "max_tokens": 3}),
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
    "/tokenize": (TokenizeRequest, {"prompt": "abc"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}


def odd_value(random_: random.Random, depth: int = 0) -> Any:
    kind = random_.random()
    if depth < 3 and kind < 0.1:
        return [odd_value(random_, depth + 1) for _ in range(random_.randrange(4))]
    if depth < 3 and kind < 0.2:
        return {str(odd_value(random_, 3))[:20]: odd_value(random_, depth + 1) for _ in range(random_.randrange(4))}
    return random_.choice(ODD)


def odd_body(random_: random.Random, names: list[str], valid: dict[str, Any]) -> bytes:
    body = dict(valid)
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        body[random_.choice(names)] = odd_value(random_)
    data = bytearray(json.dumps(body).encode())
    if random_.random() < 0.1:
        for _ in range(random_.randrange(1, 4)):
            data[random_.randrange(len(data))] = random_.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_makes_the_server_fail(texts: Texts, path: str) -> None:
    model, valid = ROUTES[path]
    random_ = random.Random(path)
    bodies = [odd_body(random_, list(model.model_fields), valid) for _ in range(2500)]
    statuses = asyncio.run(_post_all(texts, path, bodies))
    wrong = [(body, status) for body, status in zip(bodies, statuses, strict=True) if status not in (200, 400, 404)]
    assert wrong == []
    assert statuses.count(200) > 50
    assert statuses.count(400) > 50


async def _post_all(texts: Texts, path: str, bodies: list[bytes]) -> list[int]:
    context, engine, tasks = await connect(texts)
    transport = httpx.ASGITransport(make_app(context), raise_app_exceptions=False)
    headers = {"Content-Type": "application/json"}
    statuses = []
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for start in range(0, len(bodies), 50):
            posted = [client.post(path, content=body, headers=headers) for body in bodies[start : start + 50]]
            answers = await asyncio.wait_for(asyncio.gather(*posted), 30)
            statuses += [_status(answer) for answer in answers]
    assert not engine.running
    assert context.running == {}
    for task in tasks:
        task.cancel()
    return statuses


def _status(answer: httpx.Response) -> int:
    """Its status; an error inside a stream counts as one too."""
    if answer.status_code != 200:
        message = answer.json()["error"]["message"]
        assert message
        assert "\n" not in message
    return 500 if '"internal_error"' in answer.text else answer.status_code
