"""The official client against the whole server: two ranks, a mode change with every step, structured outputs, tools."""

import asyncio
import json
import random
import re

import httpx
import openai
import pytest

from tests.server.http.test_fuzz import ROUTES, odd_body
from tests.server.job import Job

pytestmark = pytest.mark.distributed
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "forecast", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server(long_folder):
    changes = {"cache.num_blocks": 2048, "server.api_key": "secret", "server.max_num_queued_requests": 2000}
    with Job(long_folder, fault="flip", **changes) as job:
        yield job


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0)


def test_completions_are_the_same_whole_and_streamed(client):
    request = {"model": "tiny", "prompt": "hello", "max_tokens": 30, "temperature": 0}
    request["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**request, logprobs=2)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30
    assert len(whole.choices[0].logprobs.token_logprobs) == 30
    assert all(value <= 0 for value in whole.choices[0].logprobs.token_logprobs)


def test_chats_are_the_same_whole_and_streamed(client):
    request = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 1, "seed": 7, "n": 2}
    whole = client.chat.completions.create(**request)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]


def test_an_output_follows_its_schema(client):
    request = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "temperature": 1}
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(**request, seed=seed, response_format=form).choices[0]
        trip = json.loads(answer.message.content)
        assert (trip["city"] in ("Rome", "Oslo"), trip["days"] in (1, 2, 3)) == (True, True)
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[a-c]{3,5}z"}, "[a-c]{3,5}z"),
        ({"choice": ["north", "south"]}, "north|south"),
        ({"grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
    ],
)
def test_an_output_follows_a_pattern_a_choice_or_a_grammar(client, wanted, pattern):
    body = {"model": "tiny", "prompt": "go", "max_tokens": 200, "temperature": 1, "seed": 1}
    answer = client.completions.create(**body, extra_body={"structured_outputs": wanted}).choices[0]
    assert re.fullmatch(pattern, answer.text)
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "forecast"}}])
def test_a_tool_that_must_be_called_is_called_as_it_declares(client, choice):
    request = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "seed": 2, "tools": [TOOL], "tool_choice": choice}
    whole = client.chat.completions.create(**request, parallel_tool_calls=False).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name == "forecast"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    arguments = ""
    for chunk in client.chat.completions.create(**request, parallel_tool_calls=False, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            arguments += part.function.arguments or ""
    assert json.loads(arguments) == json.loads(call.function.arguments)


def test_mistakes_raise_the_clients_own_errors(server, client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=9)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="huge", prompt="x")
    with pytest.raises(openai.BadRequestError, match="structured_outputs"):
        client.completions.create(model="tiny", prompt="x", extra_body={"structured_outputs": {"regex": "("}})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong").models.list()
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_makes_the_engine_fail(server, path):
    """As in `http/test_fuzz.py`, with the engine behind it: what passes the HTTP layer must not hurt the ranks."""
    model, valid = ROUTES[path]
    generator = random.Random(path + "engine")
    bodies = [odd_body(generator, list(model.model_fields), valid) for _ in range(150)]

    async def post_all():
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(client.post(path, content=body) for body in bodies))

    answers = asyncio.run(post_all())
    wrong = [
        (body, answer.text)
        for body, answer in zip(bodies, answers, strict=True)
        if answer.status_code not in (200, 400, 404)
    ]
    assert wrong == []
    assert sum(answer.status_code == 200 for answer in answers) > 3
