"""The report `long-prompt` of benchmarks/serve_report.py: running streams during the prefill of a long prompt."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve_processes import POLL_SECONDS, server
from ulysses_infer.bench.serve.answer import StreamedAnswer
from ulysses_infer.bench.serve.client import Client, Server
from ulysses_infer.bench.serve.datasets import random_items, take
from ulysses_infer.bench.serve.result import percentile
from ulysses_infer.bench.serve.serve_bench import completion_body, first_model
from ulysses_infer.bench.serve.serve_options import ENDPOINTS
from ulysses_infer.bench.serve.vocabulary import PromptVocabulary

PATH = ENDPOINTS["completions"]
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass
class LongPrompt:
    """Running streams while a long prompt is prefilled, in ms."""

    max_num_batched_tokens: int
    prefill_seconds: float
    num_steps: int
    median_step: float
    worst_step: float
    median_gap: float
    worst_gap: float
    median_gap_before: float
    """Of the same streams before the long prompt was sent."""
    num_tokens: int
    """Tokens of the streams during the prefill."""


def make_model(folder: Path) -> None:
    """Save a tiny Llama with random weights, a long context and no tokenizer."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.to(torch.bfloat16).save_pretrained(folder)


async def report_long_prompt(options: argparse.Namespace) -> list[LongPrompt]:
    """Measure one server per token budget."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for budget in options.budgets:
            words = [*options.overrides, f"scheduler.max_num_batched_tokens={budget}"]
            with server([folder, "cache.num_blocks=20000", *words]) as (_, url):
                client = Client(Server.of(url))
                try:
                    found.append(await _watch_streams(client, options, budget))
                finally:
                    client.close()
    return found


async def _watch_streams(client: Client, options: argparse.Namespace, budget: int) -> LongPrompt:
    vocabulary = PromptVocabulary(range(SHAPE["vocab_size"]))
    model = await first_model(client)
    short = take(random_items(vocabulary, 32, options.stream_len, 0.0, 0), options.streams)
    (long,) = take(random_items(vocabulary, options.tokens, 2, 0.0, 1), 1)
    answers = [StreamedAnswer() for _ in short]
    bodies = [completion_body(model, item, ignore_eos=True, return_token_ids=True) for item in short]
    streams = [
        asyncio.create_task(client.stream(PATH, body, answer)) for body, answer in zip(bodies, answers, strict=True)
    ]
    steps: dict[int, tuple[float, float]] = {}
    watch = asyncio.create_task(_collect_steps(client, steps))
    await asyncio.sleep(options.before_seconds)
    prefill = StreamedAnswer()
    await client.stream(PATH, completion_body(model, long, ignore_eos=True), prefill)
    await asyncio.sleep(2 * POLL_SECONDS)
    for task in [*streams, watch]:
        task.cancel()
    await asyncio.gather(*streams, watch, return_exceptions=True)
    if prefill.error is not None or prefill.first_token is None or not all(answer.gaps for answer in answers):
        errors = {answer.error for answer in (prefill, *answers)} - {None}
        sys.exit(f"the long prompt or a stream failed: {', '.join(map(str, errors)) or 'no tokens'}")
    return long_prompt(budget, prefill.sent, prefill.first_token, answers, steps)


async def _collect_steps(client: Client, steps: dict[int, tuple[float, float]]) -> None:
    """Record the start and duration of each step."""
    while True:
        data = await client.call("GET", "/dashboard/data?seconds=10")
        steps.update({row[0]: (row[1], row[2]) for row in data["steps"]})
        await asyncio.sleep(POLL_SECONDS)


def long_prompt(
    budget: int, start: float, end: float, answers: list[StreamedAnswer], steps: dict[int, tuple[float, float]]
) -> LongPrompt:
    """Statistics of streams and steps from `start` to `end`. steps: (start, seconds) by number."""
    during = sorted(gap for answer in answers for moment, gap in _moments(answer) if start < moment <= end)
    before = sorted(gap for answer in answers for moment, gap in _moments(answer) if moment <= start)
    seconds = sorted(taken for began, taken in steps.values() if start <= began + taken <= end)
    return LongPrompt(
        budget,
        end - start,
        len(seconds),
        percentile(seconds, 50) * 1e3,
        percentile(seconds, 100) * 1e3,
        percentile(during, 50) * 1e3,
        percentile(during, 100) * 1e3,
        percentile(before, 50) * 1e3,
        len(during),
    )


def _moments(answer: StreamedAnswer) -> Iterator[tuple[float, float]]:
    """(end, seconds) of each gap."""
    moment = answer.first_token or 0.0
    for gap in answer.gaps:
        moment += gap
        yield moment, gap


def print_long_prompt(found: list[LongPrompt], options: argparse.Namespace) -> None:
    """Print the results as a plain table."""
    print(f"{options.streams} streams while a prompt of {options.tokens} tokens is prefilled; milliseconds\n")
    titles = (
        "token budget",
        "prefill s",
        "steps",
        "step median",
        "worst",
        "gap median",
        "worst",
        "gap before",
        "tokens",
    )
    print("".join(f"{title:>13}" for title in titles))
    for row in found:
        values = (row.prefill_seconds, row.num_steps, row.median_step, row.worst_step, row.median_gap, row.worst_gap)
        cells = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]
        cells += [f"{row.median_gap_before:.1f}", str(row.num_tokens)]
        print("".join(f"{cell:>13}" for cell in [str(row.max_num_batched_tokens), *cells]))
