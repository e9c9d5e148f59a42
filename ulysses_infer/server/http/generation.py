"""The engine requests of one HTTP request: several prompts, `n` completions each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.messages import NewToken, Submit
from ulysses_infer.server.router import Served


@dataclass(frozen=True)
class Prompt:
    """A prompt: its token ids, and its text if known."""

    token_ids: list[int]
    text: str | None = None


def truncated(token_ids: list[int], limit: int | None, max_model_len: int, max_tokens: int | None) -> list[int]:
    """The last `limit` tokens; -1: as many as leave room for `max_tokens` (at least one) in `max_model_len`."""
    if limit is None or limit == 0:
        return token_ids
    room = limit if limit > 0 else max(max_model_len - (max_tokens or 1), 1)
    return token_ids[-room:]


@dataclass(frozen=True)
class Generation:
    """The work of one HTTP request."""

    id: str
    """The id of the response."""
    prompts: list[Prompt]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None
    cache_key: str = ""

    @property
    def request_ids(self) -> list[str]:
        """The engine's request ids of its prompts."""
        if len(self.prompts) == 1:
            return [self.id]
        return [f"{self.id}-{position}" for position in range(len(self.prompts))]

    @property
    def submits(self) -> list[Submit]:
        """One message to the engine per prompt."""
        params = self.params.as_computed().to_mapping()
        return [
            Submit(name, prompt.token_ids, params, self.priority, self.cache_salt, self.adapter, self.cache_key)
            for name, prompt in zip(self.request_ids, self.prompts, strict=True)
        ]


Batches = AsyncGenerator[tuple[int, list[NewToken]]]


async def generate(client: Served, generation: Generation) -> Batches:
    """Run it: yields (position of the prompt, its new tokens) as they arrive.

    Closing the generator aborts unfinished prompts. Raises what `EngineClient.generate` raises.
    """
    submits, params = generation.submits, generation.params
    num_copies = params.n // params.num_distinct
    if len(submits) > 1:
        async with aclosing(_merged(client, submits, params.num_distinct)) as items:
            async for position, batch in items:
                yield position, _copied(batch, num_copies)
        return
    async with aclosing(_tokens(client, submits[0], params.num_distinct)) as batches:
        async for batch in batches:
            yield 0, _copied(batch, num_copies)


def _copied(batch: list[NewToken], num_copies: int) -> list[NewToken]:
    """The tokens of equal outputs, of which the first was computed."""
    if num_copies == 1:
        return batch
    return [structs.replace(token, index=index) for index in range(num_copies) for token in batch]


def _tokens(client: Served, submit: Submit, num_sequences: int) -> AsyncGenerator[list[NewToken]]:
    """`client.generate` as a generator that can be closed."""
    batches: Any = client.generate(submit, num_sequences)
    return batches


async def _merged(client: Served, submits: list[Submit], num_sequences: int) -> Batches:
    """Merges the tokens of several prompts as they arrive. The first error ends all of them."""
    arrived: asyncio.Queue[tuple[int, list[NewToken]] | asyncio.Task[None]] = asyncio.Queue()

    async def feed(position: int, submit: Submit) -> None:
        async with aclosing(_tokens(client, submit, num_sequences)) as batches:
            async for batch in batches:
                arrived.put_nowait((position, batch))

    tasks = [asyncio.create_task(feed(position, submit)) for position, submit in enumerate(submits)]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    num_running = len(tasks)
    try:
        while num_running:
            item = await arrived.get()
            if isinstance(item, tuple):
                yield item
            else:
                num_running -= 1
                item.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
