"""The package `litellm`: its OpenAI, hosted vLLM and Anthropic providers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm

from tools.clients.checking import Check, Server, equal, joined, main, run_all

HELLO = [{"role": "user", "content": "What does os.path.exists do?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "forecast", "description": "The weather.", "parameters": SCHEMA}}


def request_of(server: Server, provider: str = "openai", suffix: str = "/v1", **more: Any) -> dict[str, Any]:
    """The arguments that every call has."""
    address = {"api_base": f"{server.url}{suffix}", "api_key": "none"}
    return {"model": f"{provider}/{server.model}", **address, "num_retries": 0, "timeout": 600, **more}


def chat(server: Server) -> None:
    """A whole answer."""
    answer = litellm.completion(**request_of(server), messages=HELLO, max_tokens=8)
    assert 0 < answer.usage.completion_tokens <= 8


def chat_stream_equals_the_whole(server: Server) -> None:
    """The same, streamed and whole, with usage in the stream."""
    request = request_of(server, messages=HELLO, max_tokens=12, temperature=0)
    whole = litellm.completion(**request)
    chunks = list(litellm.completion(**request, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    equal(rebuilt.choices[0].message.content, whole.choices[0].message.content)
    equal(rebuilt.usage.completion_tokens, whole.usage.completion_tokens)


def chat_as_hosted_vllm(server: Server) -> None:
    """The provider for vLLM's server."""
    answer = litellm.completion(**request_of(server, "hosted_vllm"), messages=HELLO, max_tokens=8)
    equal(answer.choices[0].message.role, "assistant")


def chat_calls_a_tool(server: Server) -> None:
    """A required call."""
    request = request_of(server, messages=HELLO, tools=[TOOL], tool_choice="required", max_tokens=200)
    message = litellm.completion(**request).choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Rome", "Oslo")


def chat_follows_a_json_schema(server: Server) -> None:
    """Structured output."""
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    answer = litellm.completion(**request_of(server), messages=HELLO, response_format=form, max_tokens=100)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Rome", "Oslo")


def completions(server: Server) -> None:
    """Text completions, whole and streamed."""
    request = request_of(server, "text-completion-openai", prompt="def read(", max_tokens=8, temperature=0)
    whole = litellm.text_completion(**request).choices[0].text
    equal(joined(chunk.choices[0].text for chunk in litellm.text_completion(**request, stream=True)), whole)


def responses(server: Server) -> None:
    """The Responses API, whole, streamed and read again."""
    request = request_of(server, input="Say hello.", max_output_tokens=8, temperature=0)
    del request["num_retries"]
    whole = litellm.responses(**request)
    text = joined(getattr(event, "delta", "") for event in litellm.responses(**request, stream=True))
    equal(text, whole.output[-1].content[0].text)


def messages_as_anthropic(server: Server) -> None:
    """The Anthropic provider."""
    answer = litellm.completion(**request_of(server, "anthropic", ""), messages=HELLO, max_tokens=8)
    assert answer.choices[0].message.content
    streamed = litellm.completion(**request_of(server, "anthropic", ""), messages=HELLO, max_tokens=8, stream=True)
    assert joined(chunk.choices[0].delta.content for chunk in streamed)


def embeddings(server: Server) -> None:
    """Two vectors of one size."""
    answer = litellm.embedding(**request_of(server), input=["a cat", "a dog"], encoding_format="float")
    equal(len({len(item["embedding"]) for item in answer.data}), 1)


def reranking(server: Server) -> None:
    """Documents by how well they fit, as hosted by vLLM."""
    request = request_of(server, "hosted_vllm", "", query="cats", documents=["a dog", "a cat"])
    del request["num_retries"]
    equal(sorted(item["index"] for item in litellm.rerank(**request).results), [0, 1])


def concurrent_requests(server: Server) -> None:
    """Eight asynchronous requests at once."""

    async def run() -> list[Any]:
        request = request_of(server, messages=HELLO, max_tokens=4)
        return await asyncio.gather(*(litellm.acompletion(**request) for _ in range(8)))

    equal(len({answer.id for answer in asyncio.run(run())}), 8)


def errors_are_the_clients_own(server: Server) -> None:
    """404 and 400 become the client's exceptions."""
    for kind, changes in ((litellm.NotFoundError, {"model": "openai/none"}), (litellm.BadRequestError, {"n": -1})):
        try:
            litellm.completion(**request_of(server, messages=HELLO, max_tokens=2) | changes)
        except kind:
            continue
        raise AssertionError(f"{changes} did not raise {kind.__name__}")


CHECKS: tuple[Check, ...] = (
    chat,
    chat_stream_equals_the_whole,
    chat_as_hosted_vllm,
    chat_calls_a_tool,
    chat_follows_a_json_schema,
    completions,
    responses,
    messages_as_anthropic,
    embeddings,
    reranking,
    concurrent_requests,
    errors_are_the_clients_own,
)

if __name__ == "__main__":
    main(run_all(CHECKS))
