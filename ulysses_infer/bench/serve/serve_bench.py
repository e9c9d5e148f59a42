"""The `bench serve` command: queries the server, prepares requests, runs, reports."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import math
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from ulysses_infer.bench.serve.arrivals import arrival_times
from ulysses_infer.bench.serve.client import Client, Server
from ulysses_infer.bench.serve.datasets import (
    Item,
    custom_items,
    prefix_items,
    random_items,
    sharegpt_items,
    take,
    trace_items,
)
from ulysses_infer.bench.serve.load import LoadRequest, LoadRun, closed_loop, open_loop
from ulysses_infer.bench.serve.repetition import REPETITIVE
from ulysses_infer.bench.serve.result import remarks, result_of, table
from ulysses_infer.bench.serve.serve_options import DEFAULT_NUM_PROMPTS, ENDPOINTS, rate_of
from ulysses_infer.bench.serve.traces import read_trace
from ulysses_infer.bench.serve.vocabulary import PromptVocabulary, ask_vocabulary
from ulysses_infer.errors import ConfigError, RequestError

DEFAULT_OUTPUT_LEN = 128


def run(options: argparse.Namespace) -> int:
    """Measure, print the result table and write its JSON. Returns the exit status: 1 if no request succeeded.

    Raises one-line `UlyssesError`s.
    """
    try:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            result = runner.run(measure(options))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return show(result, options, options.request_rate)


def show(result: dict[str, Any], options: argparse.Namespace, rate: float = math.inf) -> int:
    """Print a result and write it to `--result-file`. Returns the exit status: 1 if no request succeeded."""
    print(table(result, options.max_concurrency, rate))
    for line in remarks(result):
        print(line)
    if options.result_file is not None:
        options.result_file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0 if result["completed"] else 1


def event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop if installed, because it leaves more CPU time to the server; else None for asyncio's."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the load that the options specify; returns the result with its parameters."""
    async with connected(options) as (client, model):
        maker = RequestMaker(model, options)
        items = await make_items(client, model, options)
        done = await _run(client, items, maker, options)
    return (
        common_parameters(model, options)
        | _own_parameters(options)
        | result_of(done, dict(options.goodput), options.percentiles)
    )


@asynccontextmanager
async def connected(options: argparse.Namespace) -> AsyncIterator[tuple[Client, str]]:
    """A client of the server, and the name of the model. Raises `ConfigError` if the server cannot be reached."""
    headers = dict(options.header)
    server = Server.of(options.base_url, options.api_key, options.ca_file, headers=headers, timeout=options.timeout)
    client = Client(server)
    try:
        yield client, options.model or await first_model(client)
    except OSError as error:
        raise ConfigError(f"no server at {server.url}: {error or 'no answer'}; start one, or set --base-url") from error
    finally:
        client.close()


async def first_model(client: Client) -> str:
    """The name of the server's first model. Raises `RequestError`."""
    answer = await client.call("GET", "/v1/models")
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise RequestError(f"{client.server.url}/v1/models names no model; give --model NAME") from error


async def make_items(client: Client, model: str, options: argparse.Namespace) -> Iterator[Item] | list[Item]:
    """The dataset that the options name: a list, or an endless iterator of random prompts."""
    path: Path = options.dataset_path
    if options.dataset == "custom":
        return custom_items(path, options.output_len)
    if options.dataset == "sharegpt":
        count = options.num_prompts or DEFAULT_NUM_PROMPTS
        return await sharegpt_items(path, count, options.output_len, client, model, options.seed)
    if options.dataset in REPETITIVE:
        return REPETITIVE[options.dataset](options.input_len, options.output_len, options.seed)
    return _made_items(await vocabulary_of(client, model, options), options)


async def vocabulary_of(client: Client, model: str, options: argparse.Namespace) -> PromptVocabulary:
    """The vocabulary of random prompts. Raises `ConfigError` if the server cannot provide the requested one."""
    is_text = options.endpoint == "chat" or options.prompt_format == "text"
    vocabulary = await ask_vocabulary(client, model, is_text, options.vocab_size)
    if options.prompt_format == "ids" and not vocabulary.ids:
        raise ConfigError("--prompt-format ids: the server has no /tokenize that returns ids; give --vocab-size N")
    return vocabulary


def _made_items(vocabulary: PromptVocabulary, options: argparse.Namespace) -> Iterator[Item] | list[Item]:
    output_len, seed = options.output_len or DEFAULT_OUTPUT_LEN, options.seed
    if options.dataset == "timed_trace":
        items = trace_items(read_trace(options.dataset_path)[: options.num_prompts], vocabulary, seed)
        return [dataclasses.replace(item, output_len=options.output_len or item.output_len) for item in items]
    if options.dataset == "prefix_repetition":
        lengths = (options.prefix_len, options.suffix_len, options.num_prefixes)
        return prefix_items(vocabulary, *lengths, output_len, seed)
    return random_items(vocabulary, options.input_len, output_len, options.range_ratio, seed)


def completion_body(model: str, item: Item, **fields: Any) -> bytes:
    """A greedy streamed completion of text or token ids, as JSON."""
    common = {"temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
    own = {"model": model, "prompt": item.content, "max_tokens": item.output_len}
    return json.dumps({**own, **common, **fields}).encode()


class RequestMaker:
    """Makes the bodies of requests to one model."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self._is_chat = options.endpoint == "chat"
        self._common: dict[str, Any] = {"model": model, "temperature": options.temperature}
        self._common |= {"stream": True, "stream_options": {"include_usage": True}}
        if options.ignore_eos:
            self._common["ignore_eos"] = True
        self._common |= options.extra_body

    def body(self, item: Item) -> bytes:
        """The JSON of one request. Raises `ConfigError` if the endpoint does not accept the kind of prompt."""
        return json.dumps({**self._content(item.content), **self._common, "max_tokens": item.output_len}).encode()

    def _content(self, content: str | list[Any]) -> dict[str, Any]:
        is_messages = isinstance(content, list) and isinstance(content[0], dict)
        if not self._is_chat:
            if is_messages:
                raise ConfigError("the dataset has messages; use --endpoint chat")
            return {"prompt": content}
        if isinstance(content, str):
            return {"messages": [{"role": "user", "content": content}]}
        if not is_messages:
            raise ConfigError("the dataset has token ids, chat takes messages; use --endpoint completions")
        return {"messages": content}


async def _run(
    client: Client, items: Iterator[Item] | Sequence[Item], maker: RequestMaker, options: argparse.Namespace
) -> LoadRun:
    path = ENDPOINTS[options.endpoint]
    if options.duration is not None:
        endless = cycle(items) if isinstance(items, Sequence) else items
        bodies = (maker.body(item) for item in endless)
        return await closed_loop(client, path, bodies, options.max_concurrency, options.duration)
    is_endless = not isinstance(items, Sequence)
    taken = take(items, options.num_prompts or (DEFAULT_NUM_PROMPTS if is_endless else None))
    if not taken:
        raise ConfigError("the dataset has no requests that can be sent")
    times = arrival_times(len(taken), rate_of(options, len(taken)), options.burstiness, options.seed)
    requests = [
        LoadRequest(maker.body(item), at if item.at is None else item.at) for item, at in zip(taken, times, strict=True)
    ]
    return await open_loop(client, path, requests, options.max_concurrency)


def common_parameters(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """The parameters in the results of both `bench serve` and `bench replay`."""
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "openai" if options.endpoint == "completions" else "openai-chat",
        "base_url": options.base_url,
        "model_id": model,
        "seed": options.seed,
        "max_concurrency": options.max_concurrency,
        **dict(options.metadata),
    }


def _own_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """The further parameters of `bench serve`."""
    return {
        "dataset": options.dataset,
        "request_rate": options.request_rate if math.isfinite(options.request_rate) else "inf",
        "ramp_up": [options.ramp_up, options.ramp_up_from, options.ramp_up_to] if options.ramp_up else None,
        "burstiness": options.burstiness,
    }
