"""Medians over repeats, their spread and ratios to the best mode, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ulysses_infer.bench.workload import Sample


@dataclass(frozen=True)
class Quantity:
    """A quantity of a sample."""

    title: str
    key: str
    """Its name in JSON; vLLM's if it has one."""
    value: Callable[[Sample], float]
    higher_is_better: bool = False
    digits: int = 1


TTFT = Quantity("TTFT ms", "ttft_ms", lambda sample: sample.ttft * 1e3)
TPOT = Quantity("TPOT ms", "tpot_ms", lambda sample: sample.tpot * 1e3)
TOTAL_THROUGHPUT = Quantity(
    "tok/s", "total_token_throughput", lambda sample: sample.total_tokens / sample.seconds, True, 0
)
OUTPUT_THROUGHPUT = Quantity(
    "output tok/s", "output_throughput", lambda sample: sample.output_tokens / sample.seconds, True, 0
)
MAKESPAN = Quantity("makespan s", "makespan", lambda sample: sample.seconds, digits=2)
QUANTITIES = {
    "latency": (TTFT, TPOT),
    "throughput": (TOTAL_THROUGHPUT, OUTPUT_THROUGHPUT),
    "rollouts": (MAKESPAN, OUTPUT_THROUGHPUT),
}
"""The quantities of each benchmark. Throughput counts prompt and output tokens."""


def median_makespan(samples: Sequence[Sample]) -> float:
    """Seconds from the arrival of the requests to the last token, over the repeats."""
    return statistics.median(sample.seconds for sample in samples)


@dataclass(frozen=True)
class Summary:
    """One quantity of one mode over its repeats."""

    median: float
    low: float
    high: float
    ratio: float
    """Ratio of the median to the best mode's median."""


def summarize(values: Mapping[str, Sequence[float]], higher_is_better: bool) -> dict[str, Summary]:
    """The repeats of a quantity by mode, summarised; every mode has at least one."""
    medians = {mode: statistics.median(repeats) for mode, repeats in values.items()}
    best = (max if higher_is_better else min)(medians.values())
    return {
        mode: Summary(medians[mode], min(repeats), max(repeats), medians[mode] / best if best else 1.0)
        for mode, repeats in values.items()
    }


def summaries(kind: str, samples: Mapping[str, Sequence[Sample]]) -> list[tuple[Quantity, dict[str, Summary]]]:
    """Every quantity of a benchmark, by mode."""
    return [
        (
            quantity,
            summarize({m: [quantity.value(s) for s in own] for m, own in samples.items()}, quantity.higher_is_better),
        )
        for quantity in QUANTITIES[kind]
    ]


def comparison(kind: str, samples: Mapping[str, Sequence[Sample]], labels: Mapping[str, str]) -> Table:
    """One row per mode: per quantity the median, the range over repeats, and the ratio to the best median."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    table.add_column("mode", no_wrap=True)
    columns = summaries(kind, samples)
    for quantity, _ in columns:
        for title in (quantity.title, "range", "of best"):
            table.add_column(title, justify="right", no_wrap=True)
    for mode in samples:
        cells = [cell for quantity, by_mode in columns for cell in _cells(quantity, by_mode[mode])]
        table.add_row(labels[mode], *cells)
    return table


def _cells(quantity: Quantity, summary: Summary) -> list[Text]:
    digits = quantity.digits
    return [
        Text(f"{summary.median:.{digits}f}", style="bold green" if summary.ratio == 1 else "bold"),
        Text(f"{summary.low:.{digits}f}..{summary.high:.{digits}f}", style="dim"),
        Text(f"{summary.ratio:.2f}x", style="green" if summary.ratio == 1 else ""),
    ]


def as_json(kind: str, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """By mode: every repeat of each quantity and its median, `ttft_ms` and `median_ttft_ms`."""
    result: dict[str, Any] = {mode: {} for mode in samples}
    for quantity, by_mode in summaries(kind, samples):
        for mode, own in samples.items():
            result[mode][quantity.key] = [quantity.value(sample) for sample in own]
            result[mode][f"median_{quantity.key}"] = by_mode[mode].median
            result[mode][f"{quantity.key}_of_best"] = by_mode[mode].ratio
    return result
