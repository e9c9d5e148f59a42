"""The `openai` package: chat, completions, responses, embeddings, and its errors."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import openai

from tools.clients.checking import Check, Server, equal, joined, main, run_all

HELLO: Any = [{"role": "user", "content": "What does os.path.exists do?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORM: Any = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA, "strict": True}}
FUNCTION = {"name": "forecast", "description": "The weather of some days.", "parameters": SCHEMA}
CHAT_TOOLS: Any = [{"type": "function", "function": FUNCTION}]
TOOLS: Any = [{"type": "function", **FUNCTION, "strict": True}]


def client_of(server: Server) -> openai.OpenAI:
    """A client that does not retry, so that every failure shows."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)


def models_are_listed(server: Server) -> None:
    """The model is listed."""
    with client_of(server) as client:
        assert server.model in [model.id for model in client.models.list()]


def chat(server: Server) -> None:
    """A whole answer, with usage."""
    with client_of(server) as client:
        answer = client.chat.completions.create(model=server.model, messages=HELLO, max_tokens=8, n=2, seed=1)
    assert [choice.message.role for choice in answer.choices] == ["assistant", "assistant"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16


def chat_stream_equals_the_whole(server: Server) -> None:
    """The same seed gives the same text, streamed and whole."""
    request: dict[str, Any] = {"model": server.model, "messages": HELLO, "max_tokens": 12, "seed": 5}
    with client_of(server) as client:
        whole = client.chat.completions.create(**request)
        chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    text = joined(choice.delta.content for chunk in chunks for choice in chunk.choices)
    equal(text, whole.choices[0].message.content)
    equal(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)


def chat_log_probabilities(server: Server) -> None:
    """Log-probabilities of the tokens and of the likeliest."""
    with client_of(server) as client:
        answer = client.chat.completions.create(
            model=server.model, messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
        )
    content: Any = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)
    assert {len(token.top_logprobs) for token in content} == {3}


def chat_follows_a_json_schema(server: Server) -> None:
    """Structured output."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    with client_of(server) as client:
        answer = client.chat.completions.create(
            model=server.model, messages=HELLO, max_tokens=200, response_format=form
        )
    assert json.loads(answer.choices[0].message.content or "")["city"] in ("Rome", "Oslo")


def chat_calls_a_tool(server: Server) -> None:
    """A required call, whole and through the client's own accumulation of a stream."""
    request: dict[str, Any] = {"model": server.model, "messages": HELLO, "max_tokens": 200, "tools": CHAT_TOOLS}
    request |= {"tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    with client_of(server) as client:
        whole = client.chat.completions.create(**request).choices[0]
        with client.chat.completions.stream(**request) as stream:
            streamed: Any = stream.get_final_completion().choices[0]
    equal(whole.finish_reason, "tool_calls")
    equal(streamed.message.tool_calls[0].function.arguments, whole.message.tool_calls[0].function.arguments)
    assert 1 <= json.loads(whole.message.tool_calls[0].function.arguments)["days"] <= 9


def completions(server: Server) -> None:
    """Two prompts with two outputs each, and the prompt's own log-probabilities."""
    with client_of(server) as client:
        answer = client.completions.create(model=server.model, prompt=["def f(", "import "], max_tokens=4, n=2)
        echoed = client.completions.create(model=server.model, prompt="import os", max_tokens=1, echo=True, logprobs=1)
    equal([choice.index for choice in answer.choices], [0, 1, 2, 3])
    assert echoed.choices[0].text.startswith("import os")
    scores: Any = echoed.choices[0].logprobs and echoed.choices[0].logprobs.token_logprobs
    assert scores[0] is None
    assert all(score <= 0 for score in scores[1:])


def completions_stream_equals_the_whole(server: Server) -> None:
    """The same, streamed and whole."""
    request: dict[str, Any] = {"model": server.model, "prompt": "def read(", "max_tokens": 12, "temperature": 0}
    with client_of(server) as client:
        whole = client.completions.create(**request).choices[0].text
        equal(joined(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)), whole)


def responses(server: Server) -> None:
    """Created, read, continued, listed and deleted."""
    with client_of(server) as client:
        first = client.responses.create(model=server.model, input="Say hello.", max_output_tokens=8, temperature=0)
        equal(client.responses.retrieve(first.id).output_text, first.output_text)
        second = client.responses.create(
            model=server.model, input="Go on.", previous_response_id=first.id, max_output_tokens=8
        )
        equal(second.previous_response_id, first.id)
        assert len(client.responses.input_items.list(second.id).data) == len(first.output) + 2
        client.responses.delete(first.id)
        try:
            client.responses.retrieve(first.id)
        except openai.NotFoundError:
            return
    raise AssertionError("a deleted response is still there")


def responses_stream(server: Server) -> None:
    """Typed events with increasing numbers, accumulated by the client, which wants the response to end by itself."""
    request: dict[str, Any] = {"model": server.model, "input": "Plan.", "text": FORM, "temperature": 0}
    with client_of(server) as client:
        whole = client.responses.create(**request)
        with client.responses.stream(**request) as stream:
            events = list(stream)
            final = stream.get_final_response()
    equal([event.sequence_number for event in events], list(range(len(events))))
    equal(final.output_text, whole.output_text)
    equal(joined(event.delta for event in events if event.type == "response.output_text.delta"), whole.output_text)


def responses_in_the_background_are_cancelled(server: Server) -> None:
    """A long one, ended by the client."""
    with client_of(server) as client:
        begun = client.responses.create(
            model=server.model, input="Count.", background=True, max_output_tokens=1500, extra_body={"ignore_eos": True}
        )
        assert begun.status in ("queued", "in_progress")
        equal(client.responses.cancel(begun.id).status, "cancelled")
        equal(client.responses.retrieve(begun.id).status, "cancelled")


def responses_call_a_tool(server: Server) -> None:
    """A call, its result, and the answer after it."""
    with client_of(server) as client:
        first: Any = client.responses.create(
            model=server.model, input="Rome?", tools=TOOLS, tool_choice="required", parallel_tool_calls=False
        )
        call = next(item for item in first.output if item.type == "function_call")
        assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
        result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
        second = client.responses.create(
            model=server.model, input=result, previous_response_id=first.id, max_output_tokens=8
        )
    assert second.output_text


def responses_follow_a_json_schema(server: Server) -> None:
    """Structured text."""
    with client_of(server) as client:
        answer = client.responses.create(model=server.model, input="Plan.", text=FORM, max_output_tokens=200)
    assert json.loads(answer.output_text)["city"] in ("Rome", "Oslo")


def embeddings(server: Server) -> None:
    """Vectors of length one, as base64 (the client's default) and as numbers."""
    with client_of(server) as client:
        packed = client.embeddings.create(model=server.model, input=["a cat", "a dog"])
        plain = client.embeddings.create(model=server.model, input="a cat", encoding_format="float")
    equal(len(packed.data), 2)
    assert math.isclose(math.hypot(*plain.data[0].embedding), 1.0, rel_tol=1e-3)
    assert max(abs(a - b) for a, b in zip(packed.data[0].embedding, plain.data[0].embedding, strict=True)) < 1e-2


def concurrent_requests(server: Server) -> None:
    """The asynchronous client, with eight requests at once."""

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
            one = client.chat.completions.create
            return await asyncio.gather(
                *(one(model=server.model, messages=HELLO, max_tokens=4, seed=seed) for seed in range(8))
            )

    equal(len({answer.id for answer in asyncio.run(run())}), 8)


def errors_are_the_clients_own(server: Server) -> None:
    """404 and 400 become the client's exceptions."""
    for kind, changes in ((openai.NotFoundError, {"model": "no-such-model"}), (openai.BadRequestError, {"n": -1})):
        request: dict[str, Any] = {"model": server.model, "messages": HELLO, "max_tokens": 2, **changes}
        with client_of(server) as client:
            try:
                client.chat.completions.create(**request)
            except kind:
                continue
        raise AssertionError(f"{changes} did not raise {kind.__name__}")


CHECKS: tuple[Check, ...] = (
    models_are_listed,
    chat,
    chat_stream_equals_the_whole,
    chat_log_probabilities,
    chat_follows_a_json_schema,
    chat_calls_a_tool,
    completions,
    completions_stream_equals_the_whole,
    responses,
    responses_stream,
    responses_in_the_background_are_cancelled,
    responses_call_a_tool,
    responses_follow_a_json_schema,
    embeddings,
    concurrent_requests,
    errors_are_the_clients_own,
)

if __name__ == "__main__":
    main(run_all(CHECKS))
