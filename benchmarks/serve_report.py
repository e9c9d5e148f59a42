"""Measure the server of `ulysses-infer serve` on this machine, and say where the time goes.

    python -m benchmarks.serve_report load [MODEL] [key=value ...]      HTTP and offline `generate` on the same work
    python -m benchmarks.serve_report long-prompt [key=value ...]       streams during a prefill of 100 k tokens

`load`: 64 streams for 60 s, of which nothing may be lost; then the same prompts over HTTP and offline, alternately, on
the same engine settings and with as many in flight. Both engines stay loaded; the one that is not measured idles.
`long-prompt`: a random tiny model, one server for each `scheduler.max_num_batched_tokens`.

Others' load disturbs all of this: the last line of each report says how busy they kept the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.arguments import common_options
from benchmarks.serve_processes import (
    POLL_SECONDS,
    ROOT,
    Measured,
    Offline,
    ServerProcess,
    Steps,
    busy_seconds,
    difference,
    server,
)
from ulysses_infer.bench.serve.answer import StreamedAnswer
from ulysses_infer.bench.serve.client import Client, Server
from ulysses_infer.bench.serve.datasets import Item, random_items, take
from ulysses_infer.bench.serve.load import LoadRun, closed_loop
from ulysses_infer.bench.serve.result import percentile, result_of
from ulysses_infer.bench.serve.serve_bench import event_loop_factory, first_model
from ulysses_infer.bench.serve.vocabulary import PromptVocabulary, ask_vocabulary

PATH = "/v1/completions"
LONG_PROMPT_SHAPE: dict[str, Any] = {
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


# -- load --------------------------------------------------------------------------------------------------------


async def step_counters(client: Client) -> Steps:
    """The server's totals so far."""
    text = await client.call("GET", "/metrics")
    names = ("ulysses:steps_total", "ulysses:tokens_total", "ulysses:step_seconds_sum")
    totals = dict.fromkeys(names, 0.0)
    for line in text.splitlines():
        name = line.partition("{")[0]
        if name in totals:
            totals[name] += float(line.rpartition(" ")[2])
    return Steps(*totals.values())


@dataclass
class LoadReport:
    """What `load` found."""

    streams: int
    soak: dict[str, Any]
    """The result of the streams that had to lose nothing."""
    lost: int
    """Streams of it that failed or brought fewer tokens than asked for."""
    http: list[Measured] = field(default_factory=list)
    offline: list[Measured] = field(default_factory=list)
    client_us_per_token: float = 0.0
    foreign_cores: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """Tokens per second over HTTP to offline, of each pair of runs."""
        pairs = zip(self.http, self.offline, strict=True)
        return [http.tokens_per_second / offline.tokens_per_second for http, offline in pairs]


async def drive(
    client: Client, model: str, items: Iterator[Item] | list[Item], streams: int, seconds: float = float("inf")
) -> LoadRun:
    """Keep so many streams in flight."""
    bodies = (_body(model, item) for item in items)
    return await closed_loop(client, PATH, iter(bodies), streams, seconds)


def _body(model: str, item: Item, **more: Any) -> bytes:
    fields = {"model": model, "prompt": item.content, "max_tokens": item.output_len, "temperature": 0}
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    return json.dumps({**fields, **options, **more}).encode()


def num_lost(run: LoadRun, output_len: int) -> int:
    """Streams that failed or did not bring every token."""
    return sum(answer.error is not None or answer.output_tokens != output_len for answer in run.answers)


async def over_http(client: Client, model: str, items: list[Item], streams: int, process: ServerProcess) -> Measured:
    """Do the work over HTTP and measure."""
    steps, cpu = await step_counters(client), process.cpu_seconds()
    run = await drive(client, model, items, streams)
    spent = difference(process.cpu_seconds(), cpu) | {"client": run.cpu_seconds}
    after = await step_counters(client)
    done = Steps(after.count - steps.count, after.tokens - steps.tokens, after.seconds - steps.seconds)
    tokens = sum(answer.output_tokens for answer in run.answers)
    return Measured(tokens, run.seconds, spent, done, num_lost(run, items[0].output_len))


async def report_load(options: argparse.Namespace) -> LoadReport:
    """Start both engines, measure, compare."""
    words = [*options.overrides, f"scheduler.max_num_seqs={options.streams}"]
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    with server([options.model, *words]) as (process, url):
        offline = Offline(options.model, settings)
        client = Client(Server.of(url))
        try:
            offline.wait_until_ready()
            model = await first_model(client)
            vocabulary = await ask_vocabulary(client, model, False, options.vocab_size)
            return await _compare(options, process, offline, client, model, vocabulary)
        finally:
            client.close()
            offline.stop()


async def _compare(
    options: argparse.Namespace,
    process: ServerProcess,
    offline: Offline,
    client: Client,
    model: str,
    words: PromptVocabulary,
) -> LoadReport:
    def items(seed: int) -> Iterator[Item]:
        return random_items(words, options.input_len, options.output_len, 0.0, seed)

    await drive(client, model, take(items(-1), options.streams), options.streams)  # warm-up
    busy, own, started = busy_seconds(), _own(process, offline), time.perf_counter()
    soak = await drive(client, model, items(0), options.streams, options.seconds)
    result = result_of(soak, {}, [99.0])
    report = LoadReport(options.streams, result, num_lost(soak, options.output_len))
    waves = max(1, round(options.pair_seconds * result["request_throughput"] / options.streams))
    for repeat in range(options.repeats):
        work = take(items(repeat + 1), waves * options.streams)
        for way in ("http", "offline") if repeat % 2 == 0 else ("offline", "http"):
            if way == "http":
                idle = offline.cpu_seconds()
                measured = await over_http(client, model, work, options.streams, process)
                measured.idle_cpu = sum(difference(offline.cpu_seconds(), idle).values())
                report.http.append(measured)
            else:
                idle = process.cpu_seconds()
                measured = offline.generate(work)
                measured.idle_cpu = sum(difference(process.cpu_seconds(), idle).values())
                report.offline.append(measured)
    foreign = (busy_seconds() - busy) - (_own(process, offline) - own)
    report.foreign_cores = max(0.0, foreign / (time.perf_counter() - started))
    report.client_us_per_token = result["client"]["cpu_us_per_token"]
    return report


def _own(process: ServerProcess, offline: Offline) -> float:
    """Processor seconds of everything that belongs to the measurement."""
    return sum(process.cpu_seconds().values()) + sum(offline.cpu_seconds().values()) + time.process_time()


def print_load(report: LoadReport) -> None:
    """As plain tables."""
    soak = report.soak
    print(
        f"{report.streams} streams for {soak['duration']:.0f} s: {soak['completed']} completed, {soak['failed']} "
        f"failed, {report.lost} lost anything; {soak['output_throughput']:.0f} tokens/s, median inter-token gap "
        f"{soak['median_itl_ms']:.1f} ms, p99 {soak['p99_itl_ms']:.1f} ms; client late by at most "
        f"{soak['client']['max_lateness_ms']:.1f} ms"
    )
    print(f"\n{'run':<10}{'tokens/s':>10}{'steps/s':>10}{'ms/step':>10}{'batch':>8}{'not in steps':>14}{'idle':>8}")
    for number, pair in enumerate(zip(report.http, report.offline, strict=True), 1):
        for name, measured in zip(("HTTP", "offline"), pair, strict=True):
            print(f"{name + f' {number}':<10}{_speed_cells(measured)}")
    ratios = report.ratios
    print(f"\nHTTP / offline: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"\n{'CPU us per token':<20}{'HTTP':>10}{'offline':>10}")
    for role in sorted({role for run in report.http + report.offline for role in run.cpu}):
        cells = [_per_token(runs, role) for runs in (report.http, report.offline)]
        print(f"{role:<20}{cells[0]:>10.0f}{cells[1]:>10.0f}")
    print(f"\nother programs kept {report.foreign_cores:.1f} cores busy meanwhile")


def _speed_cells(measured: Measured) -> str:
    steps, count = measured.steps, max(measured.steps.count, 1.0)
    outside, ms = 1 - steps.seconds / measured.seconds, steps.seconds / count * 1e3
    return (
        f"{measured.tokens_per_second:>10.0f}{steps.count / measured.seconds:>10.1f}{ms:>10.2f}"
        f"{measured.tokens / count:>8.1f}{outside:>14.1%}{measured.idle_cpu / measured.seconds:>8.2f}"
    )


def _per_token(runs: list[Measured], role: str) -> float:
    return statistics.median(run.cpu.get(role, 0.0) / run.tokens for run in runs) * 1e6


# -- long prompt -------------------------------------------------------------------------------------------------


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
    """Of the same streams before the long prompt came."""
    num_tokens: int
    """That the streams got meanwhile."""


def make_model(folder: Path) -> None:
    """A tiny Llama with random weights that takes long prompts; it has no tokenizer."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**LONG_PROMPT_SHAPE))
    model.to(torch.bfloat16).save_pretrained(folder)


async def report_long_prompt(options: argparse.Namespace) -> list[LongPrompt]:
    """One server for each budget."""
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
    vocabulary = PromptVocabulary(range(LONG_PROMPT_SHAPE["vocab_size"]))
    model = await first_model(client)
    short = take(random_items(vocabulary, 32, options.stream_len, 0.0, 0), options.streams)
    (long,) = take(random_items(vocabulary, options.tokens, 2, 0.0, 1), 1)
    answers = [StreamedAnswer() for _ in short]
    bodies = [_body(model, item, return_token_ids=True) for item in short]  # there is no tokenizer, so no text to send
    streams = [
        asyncio.create_task(client.stream(PATH, body, answer)) for body, answer in zip(bodies, answers, strict=True)
    ]
    steps: dict[int, tuple[float, float]] = {}
    watch = asyncio.create_task(_collect_steps(client, steps))
    await asyncio.sleep(options.before_seconds)
    asked = StreamedAnswer()
    await client.stream(PATH, _body(model, long), asked)
    await asyncio.sleep(2 * POLL_SECONDS)
    for task in [*streams, watch]:
        task.cancel()
    await asyncio.gather(*streams, watch, return_exceptions=True)
    if asked.error is not None or asked.first_token is None or not all(answer.gaps for answer in answers):
        errors = {answer.error for answer in (asked, *answers)} - {None}
        sys.exit(f"the long prompt or a stream failed: {', '.join(map(str, errors)) or 'no tokens came'}")
    return long_prompt(budget, asked.sent, asked.first_token, answers, steps)


async def _collect_steps(client: Client, steps: dict[int, tuple[float, float]]) -> None:
    """Note when each step started and how long it took."""
    while True:
        data = await client.call("GET", "/dashboard/data?seconds=10")
        steps.update({row[0]: (row[1], row[2]) for row in data["steps"]})
        await asyncio.sleep(POLL_SECONDS)


def long_prompt(
    budget: int, start: float, end: float, answers: list[StreamedAnswer], steps: dict[int, tuple[float, float]]
) -> LongPrompt:
    """What streams and steps (by number: start, seconds) did from `start` to `end`."""
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
    """When each gap ended, and how long it was."""
    moment = answer.first_token or 0.0
    for gap in answer.gaps:
        moment += gap
        yield moment, gap


def print_long_prompt(found: list[LongPrompt], options: argparse.Namespace) -> None:
    """As a plain table."""
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


# -- command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse, measure, print."""
    options = _parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers are ended too
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        if options.report == "load":
            report = runner.run(report_load(options))
            print_load(report)
            record: Any = asdict(report) | {"ratios": report.ratios}
        else:
            found = runner.run(report_long_prompt(options))
            print_long_prompt(found, options)
            record = [asdict(row) for row in found]
    if options.json is not None:
        options.json.write_text(json.dumps(record) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reports = parser.add_subparsers(dest="report", required=True)
    load = reports.add_parser(
        "load", help="HTTP against offline generate", parents=[common_options(repeats=3, input_len=128, output_len=128)]
    )
    load.add_argument("--seconds", type=float, default=60.0, help="of the streams that may lose nothing")
    load.add_argument("--streams", type=int, default=64)
    load.add_argument("--pair-seconds", type=float, default=20.0, help="about so long each run")
    load.add_argument("--vocab-size", type=int, help="for a model without a tokenizer")
    long = reports.add_parser("long-prompt", help="running streams while a long prompt is prefilled")
    long.add_argument("--tokens", type=int, default=100_000)
    long.add_argument("--streams", type=int, default=8)
    long.add_argument("--stream-len", type=int, default=20_000, help="tokens that each stream could get at most")
    long.add_argument("--before-seconds", type=float, default=3.0, help="of the streams alone")
    long.add_argument("--budgets", type=_numbers, default=[512, 2048, 8192], metavar="N,N", help="token budgets")
    for report in (load, long):
        report.add_argument("words", nargs="*", metavar="MODEL or key=value", help="default: models/demo parallel.sp=2")
        report.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    options.overrides = [word for word in options.words if "=" in word] or ["parallel.sp=2"]
    options.model = next((word for word in options.words if "=" not in word), str(ROOT / "models" / "demo"))
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
