"""Measures where the time of `ulysses-infer serve` goes on this machine.

    python -m benchmarks.serve_report load [MODEL] [key=value ...]      HTTP and offline `generate` on the same work
    python -m benchmarks.serve_report long-prompt [key=value ...]       streams during a prefill of 100 k tokens

`load`: 64 streams for 60 s, none of which may fail or lose tokens; then the same prompts over HTTP and offline,
alternately, with the same engine settings and concurrency. Both engines stay loaded; one is idle while the other runs.
`long-prompt`: a tiny random model, one server per `scheduler.max_num_batched_tokens`.

Other programs disturb the results; the last line of the report `load` shows how many cores they kept busy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.arguments import common_options
from benchmarks.serve_long_prompt import print_long_prompt, report_long_prompt
from benchmarks.serve_processes import (
    ROOT,
    Measured,
    Offline,
    ServerProcess,
    Steps,
    busy_seconds,
    difference,
    server,
)
from ulysses_infer.bench.serve.client import Client, Server
from ulysses_infer.bench.serve.datasets import Item, random_items, take
from ulysses_infer.bench.serve.load import LoadRun, closed_loop
from ulysses_infer.bench.serve.result import result_of
from ulysses_infer.bench.serve.serve_bench import completion_body, event_loop_factory, first_model
from ulysses_infer.bench.serve.serve_options import ENDPOINTS
from ulysses_infer.bench.serve.vocabulary import PromptVocabulary, ask_vocabulary
from ulysses_infer.child_processes import end_children_with_this_process

PATH = ENDPOINTS["completions"]


async def step_counters(client: Client) -> Steps:
    """The server's current totals."""
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
    """The results of `load`."""

    streams: int
    soak: dict[str, Any]
    """The result of the first streams, none of which may fail."""
    lost: int
    """Streams among them that failed or had too few tokens."""
    http: list[Measured] = field(default_factory=list)
    offline: list[Measured] = field(default_factory=list)
    client_us_per_token: float = 0.0
    foreign_cores: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """Tokens per second over HTTP relative to offline, for each pair of runs."""
        pairs = zip(self.http, self.offline, strict=True)
        return [http.tokens_per_second / offline.tokens_per_second for http, offline in pairs]


async def drive(
    client: Client, model: str, items: Iterator[Item] | list[Item], streams: int, seconds: float = float("inf")
) -> LoadRun:
    """Keep `streams` streams in flight."""
    bodies = (completion_body(model, item, ignore_eos=True) for item in items)
    return await closed_loop(client, PATH, iter(bodies), streams, seconds)


def num_lost(run: LoadRun, output_len: int) -> int:
    """Number of streams that failed or had too few tokens."""
    return sum(answer.error is not None or answer.output_tokens != output_len for answer in run.answers)


async def over_http(client: Client, model: str, items: list[Item], streams: int, process: ServerProcess) -> Measured:
    """Complete the prompts over HTTP and measure."""
    steps, cpu = await step_counters(client), process.cpu_seconds()
    run = await drive(client, model, items, streams)
    spent = difference(process.cpu_seconds(), cpu) | {"client": run.cpu_seconds}
    after = await step_counters(client)
    done = Steps(after.count - steps.count, after.tokens - steps.tokens, after.seconds - steps.seconds)
    tokens = sum(answer.output_tokens for answer in run.answers)
    return Measured(tokens, run.seconds, spent, done, num_lost(run, items[0].output_len))


async def report_load(options: argparse.Namespace) -> LoadReport:
    """Start both engines, then measure them."""
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
        for kind in ("http", "offline") if repeat % 2 == 0 else ("offline", "http"):
            if kind == "http":
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
    """CPU seconds of all processes of the measurement."""
    return sum(process.cpu_seconds().values()) + sum(offline.cpu_seconds().values()) + time.process_time()


def print_load(report: LoadReport) -> None:
    """Print the results as plain tables."""
    soak = report.soak
    print(
        f"{report.streams} streams for {soak['duration']:.0f} s: {soak['completed']} completed, {soak['failed']} "
        f"failed, {report.lost} lost; {soak['output_throughput']:.0f} tokens/s, median inter-token gap "
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
    print(f"\nother programs kept {report.foreign_cores:.1f} cores busy")


def _speed_cells(measured: Measured) -> str:
    steps, count = measured.steps, max(measured.steps.count, 1.0)
    outside, ms = 1 - steps.seconds / measured.seconds, steps.seconds / count * 1e3
    return (
        f"{measured.tokens_per_second:>10.0f}{steps.count / measured.seconds:>10.1f}{ms:>10.2f}"
        f"{measured.tokens / count:>8.1f}{outside:>14.1%}{measured.idle_cpu / measured.seconds:>8.2f}"
    )


def _per_token(runs: list[Measured], role: str) -> float:
    return statistics.median(run.cpu.get(role, 0.0) / run.tokens for run in runs) * 1e6


def main() -> None:
    """Parse, measure, print."""
    options = _parse()
    end_children_with_this_process()
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
    load.add_argument("--seconds", type=float, default=60.0, help="duration of the first streams (default 60)")
    load.add_argument("--streams", type=int, default=64)
    load.add_argument("--pair-seconds", type=float, default=20.0, help="approximate duration of each run (default 20)")
    load.add_argument("--vocab-size", type=int, help="for a model without a tokenizer")
    long = reports.add_parser("long-prompt", help="running streams while a long prompt is prefilled")
    long.add_argument("--tokens", type=int, default=100_000)
    long.add_argument("--streams", type=int, default=8)
    long.add_argument("--stream-len", type=int, default=20_000, help="maximum number of tokens per stream")
    long.add_argument("--before-seconds", type=float, default=3.0, help="time before the long prompt is sent")
    long.add_argument("--budgets", type=_numbers, default=[512, 2048, 8192], metavar="N,N", help="token budgets")
    for report in (load, long):
        report.add_argument("words", nargs="*", metavar="MODEL or key=value", help="default: models/demo parallel.sp=2")
        report.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()
    options.overrides = [word for word in options.words if "=" in word] or ["parallel.sp=2"]
    options.model = next((word for word in options.words if "=" not in word), str(ROOT / "models" / "demo"))
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
