"""Measures one run: one contender, one case."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import suppress
from typing import Any

from ulysses_infer.bench.compare.findings import ContenderRun, RequestRow, StepRow
from ulysses_infer.bench.compare.protocols import LONE, ComparisonCase
from ulysses_infer.bench.load import LoadMeter
from ulysses_infer.bench.serve.answer import StreamedAnswer
from ulysses_infer.bench.serve.client import Client
from ulysses_infer.bench.serve.datasets import take, trace_items
from ulysses_infer.bench.serve.item import Item
from ulysses_infer.bench.serve.load import LoadRequest, LoadRun, closed_loop, open_loop
from ulysses_infer.bench.serve.repetition import REPETITIVE
from ulysses_infer.bench.serve.result import percentile
from ulysses_infer.bench.serve.serve_bench import completion_body
from ulysses_infer.bench.serve.serve_options import ENDPOINTS
from ulysses_infer.bench.serve.vocabulary import PromptVocabulary, ask_vocabulary
from ulysses_infer.errors import RequestError

PATH = ENDPOINTS["completions"]
WATCH_SECONDS = 0.5
WINDOW_SECONDS = 10
IDLE_SECONDS = 5.0
IDLE_POLL_SECONDS = 0.02
DIGITS = 6


class Site:
    """A server under measurement, with its client and the vocabulary of its prompts."""

    def __init__(self, client: Client, model: str, vocabulary: PromptVocabulary) -> None:
        self.client, self._model, self._vocabulary = client, model, vocabulary

    @classmethod
    async def of(cls, client: Client, vocab_size: int) -> Site:
        """Query the server for its model. vocab_size: for a model without a tokenizer."""
        card = (await client.call("GET", "/v1/models"))["data"][0]
        vocabulary = await ask_vocabulary(client, card["id"], False, None)
        if not vocabulary.ids:
            vocabulary = PromptVocabulary(range(vocab_size))
        return cls(client, card["id"], vocabulary)

    def items(self, case: ComparisonCase, seed: int) -> list[Item]:
        """The requests of a case; the seed determines the prompts."""
        if case.dataset:
            row = case.rows[0]
            return take(REPETITIVE[case.dataset](row.input_len, row.output_len, seed), len(case.rows))
        return trace_items(case.rows, self._vocabulary, seed, case.block_tokens)

    def body(self, item: Item) -> bytes:
        """The JSON body of a request."""
        return completion_body(self._model, item, ignore_eos=True, return_token_ids=True)  # one piece per token

    async def set_policy(self, policy: dict[str, Any]) -> None:
        """Change the policy; an empty one changes nothing. Raises `RequestError` if the server refuses it."""
        if policy:
            await self.client.call("PUT", "/admin/policy", policy)

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache once the server is idle. Raises `RequestError` if it stays busy."""
        deadline = time.monotonic() + IDLE_SECONDS
        while True:
            try:
                await self.client.call("POST", "/admin/reset_prefix_cache")
                return
            except RequestError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(IDLE_POLL_SECONDS)


async def measure(site: Site, case: ComparisonCase, contender: str, repeat: int) -> ContenderRun:
    """Run a case once on a server whose policy is already set."""
    await site.reset_prefix_cache()
    requests = [LoadRequest(site.body(item), item.at or 0.0) for item in site.items(case, repeat)]
    steps = _StepWatch(site.client)
    load = LoadMeter()
    watching = asyncio.create_task(steps.watch())
    try:
        done = await _send(site.client, case, requests)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    foreign = load.foreign_cores()
    await steps.look()
    rows = [_request_row(answer, done.started) for answer in done.answers]
    return ContenderRun(
        contender,
        case.name,
        repeat,
        metrics_of(rows),
        rows,
        steps.rows(done.started, done.ended),
        [round(gap, DIGITS) for answer in done.answers for gap in answer.gaps],
        done.seconds,
        foreign,
        max((answer.lateness for answer in done.answers), default=0.0) * 1e3,
    )


async def _send(client: Client, case: ComparisonCase, requests: list[LoadRequest]) -> LoadRun:
    if case.kind == LONE:
        return await closed_loop(client, PATH, (request.body for request in requests), 1)
    return await open_loop(client, PATH, requests)


def _request_row(answer: StreamedAnswer, started: float) -> RequestRow:
    tpot = None if answer.tpot is None else round(answer.tpot, DIGITS)
    counts = (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens)
    times = (round(seconds, DIGITS) for seconds in (answer.sent - started, answer.ttft, answer.e2el))
    sent, ttft, e2el = times
    return RequestRow(sent, ttft, tpot, e2el, *counts, answer.error or "")


def metrics_of(rows: list[RequestRow]) -> dict[str, float]:
    """The compared metrics of a run, times in ms. Failed requests are left out; empty if all failed."""
    good = [row for row in rows if not row.error]
    if not good:
        return {}
    seconds = max(row.ended for row in good) - min(row.sent for row in rows)
    metrics = {"tokens_per_second": sum(row.input_tokens + row.output_tokens for row in good) / max(seconds, 1e-9)}
    metrics["requests_per_second"] = len(good) / max(seconds, 1e-9)
    tpots = [row.tpot for row in good if row.tpot is not None]
    for name, values in (("ttft", [row.ttft for row in good]), ("tpot", tpots), ("e2el", [row.e2el for row in good])):
        if values:
            ordered = [value * 1e3 for value in sorted(values)]
            metrics |= {f"{name}_ms": statistics.median(ordered), f"{name}_p99_ms": percentile(ordered, 99)}
            metrics[f"{name}_mean_ms"] = statistics.fmean(ordered)
    return metrics


class _StepWatch:
    """Collects the steps of a server from its dashboard, which keeps only the last thousand."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._found: dict[tuple[int, float], StepRow] = {}
        self._since: float | None = None

    async def watch(self) -> None:
        """Poll the dashboard repeatedly."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Collect new steps. Times are converted from the server's clock to `time.perf_counter`."""
        since = "" if self._since is None else f"&since={self._since}"
        data = await self._client.call("GET", f"/dashboard/data?seconds={WINDOW_SECONDS}{since}")
        shift = time.perf_counter() - data["now"]
        self._since = data["now"]
        modes = [(mode["sp"], mode["tp"]) for mode in data["modes"]]
        for sequence, start, seconds, mode, tokens, decodes in data["steps"]:
            sp, tp = modes[mode]
            self._found.setdefault((sequence, start), StepRow(start + shift, seconds, sp, tp, tokens, decodes))

    def rows(self, start: float, end: float) -> list[StepRow]:
        """Steps between two times, relative to the first."""
        found = sorted(self._found.values())
        inside = [row for row in found if row.start + row.seconds > start and row.start < end]
        return [row._replace(start=round(row.start - start, DIGITS)) for row in inside]
