"""The `bench replay` command: cuts and scales a trace, builds prompts, sends them, reports."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Sequence
from typing import Any

from ulysses_infer.bench.replay.replay_options import scale_of, window_of
from ulysses_infer.bench.replay.scaling import thinned
from ulysses_infer.bench.serve.client import Client
from ulysses_infer.bench.serve.datasets import trace_items
from ulysses_infer.bench.serve.load import LoadRequest, open_loop
from ulysses_infer.bench.serve.result import result_of
from ulysses_infer.bench.serve.serve_bench import (
    RequestMaker,
    common_parameters,
    connected,
    event_loop_factory,
    show,
    vocabulary_of,
)
from ulysses_infer.bench.serve.serve_options import ENDPOINTS
from ulysses_infer.bench.serve.traces import TraceRow, read_trace


def run(options: argparse.Namespace) -> int:
    """Replay, print the result table and write its JSON. Returns the exit status: 1 if no request succeeded.

    Raises one-line `UlyssesError`s.
    """
    rows = chosen_rows(options)
    print(describe(rows, options))
    try:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            result = runner.run(measure(rows, options))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return show(result, options)


def chosen_rows(options: argparse.Namespace) -> list[TraceRow]:
    """The rows that the options select, scaled. Raises `ConfigError`."""
    rows = window_of(options).cut(read_trace(options.trace))
    return scale_of(options).apply(rows if options.num_prompts is None else thinned(rows, options.num_prompts))


def describe(rows: Sequence[TraceRow], options: argparse.Namespace) -> str:
    """A one-line summary of the requests."""
    inputs, outputs = [row.input_len for row in rows], [row.output_len for row in rows]
    line = (
        f"{options.trace.name}: {len(rows)} requests in {rows[-1].at:.0f} s; "
        f"prompts of {sum(inputs) / len(rows):.0f} tokens on average, {max(inputs)} at most; "
        f"answers of {sum(outputs) / len(rows):.0f}, {max(outputs)} at most"
    )
    shared = shared_tokens(rows, scale_of(options).block_tokens)
    return line + (f"; {shared / sum(inputs):.0%} of prompt tokens repeat earlier prefixes" if shared else "")


def shared_tokens(rows: Sequence[TraceRow], block_tokens: float) -> float:
    """Prompt tokens in prefixes of earlier prompts of the trace: the most that prefix caching could save."""
    seen: set[int] = set()
    shared = 0.0
    for row in rows:
        known = next((i for i, hash_id in enumerate(row.hash_ids) if hash_id not in seen), len(row.hash_ids))
        shared += min(known * block_tokens, row.input_len)
        seen.update(row.hash_ids)
    return shared


async def measure(rows: Sequence[TraceRow], options: argparse.Namespace) -> dict[str, Any]:
    """Replay on the server that the options name; returns the result with its parameters."""
    async with connected(options) as (client, model):
        await warn_of_long_rows(client, rows)
        vocabulary = await vocabulary_of(client, model, options)
        maker = RequestMaker(model, options)
        items = trace_items(rows, vocabulary, options.seed, scale_of(options).block_tokens)
        requests = [LoadRequest(maker.body(item), item.at or 0.0) for item in items]
        done = await open_loop(client, ENDPOINTS[options.endpoint], requests, options.max_concurrency)
    parameters = common_parameters(model, options) | _own_parameters(options)
    return parameters | result_of(done, dict(options.goodput), options.percentiles)


async def warn_of_long_rows(client: Client, rows: Sequence[TraceRow]) -> None:
    """Print a warning if some requests are longer than the server allows."""
    models = await client.call("GET", "/v1/models")
    limit = models["data"][0].get("max_model_len") if models.get("data") else None
    if limit is None:
        return
    too_long = sum(row.input_len + row.output_len > limit for row in rows)
    if too_long:
        print(
            f"{too_long} of them are longer than the server's limit of {limit} tokens and will fail; "
            "lower --length-scale, or give --max-input-len and --max-output-len"
        )


def _own_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """The further parameters of `bench replay`."""
    window = window_of(options)
    return {
        "dataset": options.trace.name,
        "start_minute": window.start,
        "end_minute": window.end if window.end < float("inf") else None,
        "time_scale": options.time_scale,
        "length_scale": options.length_scale,
        "max_input_len": options.max_input_len,
        "max_output_len": options.max_output_len,
        "num_prompts": options.num_prompts,
    }
