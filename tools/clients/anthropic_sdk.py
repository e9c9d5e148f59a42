"""The `anthropic` package: messages, streams, tools, and counts of tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic

from tools.clients.checking import Check, Server, equal, joined, main, run_all

HELLO: Any = [{"role": "user", "content": "What does os.path.exists do?"}]
TOOL: Any = {
    "name": "forecast",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def client_of(server: Server) -> anthropic.Anthropic:
    """A client that does not retry, so that every failure shows."""
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=600)


def messages(server: Server) -> None:
    """A whole message with usage, and a system prompt."""
    with client_of(server) as client:
        answer = client.messages.create(model=server.model, max_tokens=8, messages=HELLO, system="Be brief.")
    equal((answer.type, answer.role), ("message", "assistant"))
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert 0 < answer.usage.output_tokens <= 8


def stream_equals_the_whole(server: Server) -> None:
    """The client accumulates a stream to the message that a whole request returns."""
    request: dict[str, Any] = {"model": server.model, "max_tokens": 12, "messages": HELLO, "extra_body": GREEDY}
    with client_of(server) as client:
        whole = client.messages.create(**request)
        with client.messages.stream(**request) as stream:
            text = joined(stream.text_stream)
            final = stream.get_final_message()
    equal(text, joined(block.text for block in whole.content))
    equal((final.stop_reason, final.usage.output_tokens), (whole.stop_reason, whole.usage.output_tokens))


def tokens_are_counted(server: Server) -> None:
    """`count_tokens` and the usage of a message agree."""
    with client_of(server) as client:
        counted = client.messages.count_tokens(model=server.model, messages=HELLO)
        usage = client.messages.create(model=server.model, max_tokens=1, messages=HELLO).usage
    equal(counted.input_tokens, usage.input_tokens + (usage.cache_read_input_tokens or 0))


def a_tool_is_used(server: Server) -> None:
    """A call, whole and streamed, and the answer after its result."""
    request: dict[str, Any] = {"model": server.model, "max_tokens": 200, "tools": [TOOL]}
    choice: Any = {"type": "tool", "name": "forecast", "disable_parallel_tool_use": True}
    with client_of(server) as client:
        answer: Any = client.messages.create(**request, messages=HELLO, tool_choice=choice)
        with client.messages.stream(**request, messages=HELLO, tool_choice=choice) as stream:
            final: Any = stream.get_final_message()
        uses = [block for block in answer.content if block.type == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses]
        turns: Any = [*HELLO, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
        after = client.messages.create(**request | {"max_tokens": 8}, messages=turns)
    for message in (answer, final):
        equal(message.stop_reason, "tool_use")
        assert all(block.input["city"] in ("Rome", "Oslo") for block in message.content if block.type == "tool_use")
    assert after.usage.input_tokens + (after.usage.cache_read_input_tokens or 0) > answer.usage.input_tokens


def stop_sequences_are_named(server: Server) -> None:
    """The text ends before the sequence that stopped it."""
    with client_of(server) as client:
        request: dict[str, Any] = {"model": server.model, "max_tokens": 40, "messages": HELLO, "extra_body": GREEDY}
        text = joined(block.text for block in client.messages.create(**request).content)
        stop = text[len(text) // 2 :].strip()[:3]
        stopped = client.messages.create(**request, stop_sequences=[stop])
    equal((stopped.stop_reason, stopped.stop_sequence), ("stop_sequence", stop))
    assert stop not in joined(block.text for block in stopped.content)


def concurrent_requests(server: Server) -> None:
    """The asynchronous client, with four requests at once."""

    async def run() -> list[Any]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", timeout=600) as client:
            one = client.messages.create
            return await asyncio.gather(*(one(model=server.model, max_tokens=4, messages=HELLO) for _ in range(4)))

    equal(len({answer.id for answer in asyncio.run(run())}), 4)


def errors_are_the_clients_own(server: Server) -> None:
    """404 and 400 become the client's exceptions."""
    wrong: tuple[tuple[type[Exception], dict[str, Any]], ...] = (
        (anthropic.NotFoundError, {"model": "no-such-model"}),
        (anthropic.BadRequestError, {"max_tokens": 0}),
    )
    for kind, changes in wrong:
        request: dict[str, Any] = {"model": server.model, "messages": HELLO, "max_tokens": 2, **changes}
        with client_of(server) as client:
            try:
                client.messages.create(**request)
            except kind:
                continue
        raise AssertionError(f"{changes} did not raise {kind.__name__}")


GREEDY = {"temperature": 0}
CHECKS: tuple[Check, ...] = (
    messages,
    stream_equals_the_whole,
    tokens_are_counted,
    a_tool_is_used,
    stop_sequences_are_named,
    concurrent_requests,
    errors_are_the_clients_own,
)

if __name__ == "__main__":
    main(run_all(CHECKS))
