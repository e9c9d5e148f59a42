"""The metrics of a run under vLLM's names, as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ulysses_infer.bench.serve.answer import StreamedAnswer
from ulysses_infer.bench.serve.load import LoadRun

WIDTH, LABEL_WIDTH, VALUE_WIDTH = 50, 40, 10
MEASURES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
"""By key: short and long name."""
LATE_SECONDS = 0.01  # if the p99 of the client's delays is higher, the results are not reliable
SHOWN_ERRORS = 3


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of sorted values, linearly interpolated; 0 without values."""
    if not values:
        return 0.0
    position = (len(values) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def result_of(run: LoadRun, goodput: Mapping[str, float], percentiles: Sequence[float]) -> dict[str, Any]:
    """All results, with JSON keys in the order of the table. goodput: limits in ms by metric."""
    good = [answer for answer in run.answers if answer.error is None]
    seconds = max(run.seconds, 1e-9)
    total_input = sum(answer.prompt_tokens for answer in good)
    total_output = sum(answer.output_tokens for answer in good)
    result: dict[str, Any] = {
        "duration": run.seconds,
        "completed": len(good),
        "failed": len(run.answers) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) / seconds,
        "request_goodput": num_within(good, goodput) / seconds if goodput else None,
        "output_throughput": total_output / seconds,
        "max_output_tokens_per_s": peak_tokens_per_second(good, run.started),
        "max_concurrent_requests": peak_concurrency(run.answers),
        "total_token_throughput": (total_input + total_output) / seconds,
    }
    for key, values in measured(good).items():
        result |= _spread(key, sorted(values), percentiles)
    return result | _client(run, total_output) | _by_request(run)


def measured(answers: Sequence[StreamedAnswer]) -> dict[str, list[float]]:
    """All values in ms by metric."""
    return {
        "ttft": [answer.ttft * 1e3 for answer in answers],
        "tpot": [answer.tpot * 1e3 for answer in answers if answer.tpot is not None],
        "itl": [gap * 1e3 for answer in answers for gap in answer.gaps],
        "e2el": [answer.e2el * 1e3 for answer in answers],
    }


def _spread(key: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    spread = {
        f"mean_{key}_ms": statistics.fmean(values) if values else 0.0,
        f"median_{key}_ms": percentile(values, 50),
        f"std_{key}_ms": statistics.pstdev(values) if values else 0.0,
    }
    return spread | {f"p{percent:g}_{key}_ms": percentile(values, percent) for percent in percentiles}


def num_within(answers: Sequence[StreamedAnswer], limits: Mapping[str, float]) -> int:
    """Number of answers within all limits (ms, of ttft, tpot and e2el)."""

    def is_within(answer: StreamedAnswer) -> bool:
        return all((getattr(answer, key) or 0.0) * 1e3 <= limit for key, limit in limits.items())

    return sum(is_within(answer) for answer in answers)


def peak_tokens_per_second(answers: Sequence[StreamedAnswer], started: float) -> float:
    """The highest number of tokens in any one-second interval since the start of the run."""
    seconds: Counter[int] = Counter()
    tokens: dict[int, float] = {}
    for answer in answers:
        moment = answer.sent + answer.ttft
        per_piece = answer.output_tokens / (len(answer.gaps) + 1)  # a chunk may have several tokens
        seconds.clear()
        for gap in (0.0, *answer.gaps):
            moment += gap
            seconds[int(moment - started)] += 1
        for second, count in seconds.items():
            tokens[second] = tokens.get(second, 0.0) + count * per_piece
    return max(tokens.values(), default=0.0)


def peak_concurrency(answers: Sequence[StreamedAnswer]) -> int:
    """The highest number of requests in flight."""
    changes = sorted([(answer.sent, 1) for answer in answers] + [(answer.ended, -1) for answer in answers])
    peak = current = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak


def _client(run: LoadRun, output_tokens: int) -> dict[str, Any]:
    """The client's own delays and CPU use: a slow client distorts the result."""
    late, lags = sorted(answer.lateness for answer in run.answers), sorted(run.loop_lags)
    return {
        "client": {
            "mean_lateness_ms": statistics.fmean(late) * 1e3 if late else 0.0,
            "p99_lateness_ms": percentile(late, 99) * 1e3,
            "max_lateness_ms": percentile(late, 100) * 1e3,
            "p99_loop_lag_ms": percentile(lags, 99) * 1e3,
            "max_loop_lag_ms": percentile(lags, 100) * 1e3,
            "held_back": sum(answer.due > answer.scheduled for answer in run.answers),
            "connections": run.num_connections,
            "cpu_seconds": run.cpu_seconds,
            "cpu_share": run.cpu_seconds / max(run.seconds, 1e-9),
            "cpu_us_per_token": run.cpu_seconds * 1e6 / output_tokens if output_tokens else 0.0,
        }
    }


def _by_request(run: LoadRun) -> dict[str, list[Any]]:
    """One entry per request, times in seconds; failed requests have zeros and an error."""
    rows = [(answer, answer.error is None) for answer in run.answers]
    return {
        "input_lens": [answer.prompt_tokens for answer, _ in rows],
        "output_lens": [answer.output_tokens if good else 0 for answer, good in rows],
        "ttfts": [answer.ttft if good else 0.0 for answer, good in rows],
        "itls": [answer.gaps if good else [] for answer, good in rows],
        "start_times": [answer.sent - run.started for answer, _ in rows],
        "errors": [answer.error or "" for answer, _ in rows],
    }


def table(result: Mapping[str, Any], max_concurrency: int | None = None, rate: float = math.inf) -> str:
    """The result table in vLLM's format."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines += [_line("Successful requests:", result["completed"]), _line("Failed requests:", result["failed"])]
    if max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", max_concurrency))
    if math.isfinite(rate):
        lines.append(_line("Request rate configured (RPS):", float(rate)))
    lines.append(_line("Benchmark duration (s):", result["duration"]))
    lines.append(_line("Total input tokens:", result["total_input_tokens"]))
    lines.append(_line("Total generated tokens:", result["total_output_tokens"]))
    lines.append(_line("Request throughput (req/s):", result["request_throughput"]))
    if result["request_goodput"] is not None:
        lines.append(_line("Request goodput (req/s):", result["request_goodput"]))
    lines.append(_line("Output token throughput (tok/s):", result["output_throughput"]))
    lines.append(_line("Peak output token throughput (tok/s):", float(result["max_output_tokens_per_s"])))
    lines.append(_line("Peak concurrent requests:", float(result["max_concurrent_requests"])))
    lines.append(_line("Total token throughput (tok/s):", result["total_token_throughput"]))
    for key, (short, long) in MEASURES.items():
        lines.append(f"{long:-^{WIDTH}}")
        lines += _spread_lines(result, key, short)
    return "\n".join([*lines, "=" * WIDTH])


def _spread_lines(result: Mapping[str, Any], key: str, short: str) -> list[str]:
    lines = [_line(f"{kind} {short} (ms):", result[f"{kind.lower()}_{key}_ms"]) for kind in ("Mean", "Median")]
    marks = [name for name in result if name.startswith("p") and name.endswith(f"_{key}_ms")]
    return lines + [_line(f"P{name.split('_')[0][1:]} {short} (ms):", result[name]) for name in marks]


def _line(label: str, value: float) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<{LABEL_WIDTH}} {text:<{VALUE_WIDTH}}"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Notes below the table: the client's performance, and failures."""
    client = result["client"]
    lines = [
        f"client: late by {client['mean_lateness_ms']:.1f} ms on average, {client['max_lateness_ms']:.1f} at most; "
        f"event loop by {client['p99_loop_lag_ms']:.1f} (p99), {client['max_loop_lag_ms']:.1f} at most; "
        f"{client['cpu_us_per_token']:.0f} us of CPU per token, {client['cpu_share']:.0%} of a core; "
        f"{client['connections']} connections"
    ]
    if client["p99_lateness_ms"] > LATE_SECONDS * 1e3:
        lines.append("the client sent requests late: the load was lower than specified")
    if client["p99_loop_lag_ms"] > LATE_SECONDS * 1e3:
        lines.append("the client's event loop was delayed: measured latencies are too high")
    if client["held_back"]:
        lines.append(f"{client['held_back']} requests were delayed by --max-concurrency")
    counts = Counter(error for error in result["errors"] if error)
    lines += [f"failed, {count} x: {error}" for error, count in counts.most_common(SHOWN_ERRORS)]
    if len(counts) > SHOWN_ERRORS:
        lines.append(f"failed: {len(counts) - SHOWN_ERRORS} more kinds of errors; see errors in --result-file")
    return lines
