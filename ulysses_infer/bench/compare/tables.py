"""The comparison as terminal tables and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulysses_infer.bench.compare.comparison import METRICS, METRICS_OF, ComparisonRow, remarks, rows_of
from ulysses_infer.bench.compare.findings import CaseInfo, Findings
from ulysses_infer.bench.compare.protocols import SATURATED

LEFT_OUT = ("ttft_p99_ms", "tpot_p99_ms", "e2el_p99_ms", "tokens_per_second")
"""Metrics that do not fit on a terminal; the report shows them."""
MOST_RANGES = 2  # number of metrics up to which ranges fit too


def print_findings(console: Console, findings: Findings) -> None:
    """One table per case, then the warnings."""
    for case in findings.cases:
        rows = rows_of(findings, case)
        if rows:
            console.print(Text.assemble(f"\n{case.protocol}: ", (case.title, "bold")))
            console.print(case_table(case, rows))
    for line in remarks(findings):
        console.print(Text(line, style="yellow"))


def case_table(case: CaseInfo, rows: Sequence[ComparisonRow]) -> Table:
    """One row per contender; per metric the median, the range, and the ratio to the best static mode."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    table.add_column("", no_wrap=True)
    keys = [key for key in METRICS_OF[case.kind] if key not in LEFT_OUT or case.kind == SATURATED]
    has_ranges = len(keys) <= MOST_RANGES
    for key in keys:
        metric = METRICS[key]
        title = metric.title if metric.unit == "tok/s" else f"{metric.title} {metric.unit}"
        table.add_column(title, justify="right", no_wrap=True)
        if has_ranges:
            table.add_column("range", justify="right", no_wrap=True)
        table.add_column("of static", justify="right", no_wrap=True)
    found = {(row.contender, row.metric.key): row for row in rows}
    for name in dict.fromkeys(row.contender for row in rows):
        table.add_row(name, *(cell for key in keys for cell in _cells(found.get((name, key)), has_ranges)))
    return table


def _cells(row: ComparisonRow | None, has_range: bool) -> list[Text]:
    if row is None:
        return [Text("-"), *[Text("")] * (1 + has_range)]
    text, value = row.metric.text, row.value
    ratio = "" if row.ratio is None else f"{row.ratio.median:.2f}x"
    return [
        Text(text(value.median), style="bold green" if row.is_best else "bold"),
        *([Text(f"{text(value.low)}..{text(value.high)}", style="dim")] if has_range else []),
        Text(ratio),
    ]


def write_csv(findings: Findings, folder: Path) -> None:
    """`summary.csv`, `requests.csv` and `steps.csv`: all data."""
    _write(folder / "summary.csv", SUMMARY_COLUMNS, _summary_lines(findings))
    _write(
        folder / "requests.csv",
        (
            "contender",
            "case",
            "repeat",
            "sent_s",
            "ttft_s",
            "tpot_s",
            "e2el_s",
            "input_tokens",
            "output_tokens",
            "cached_tokens",
            "error",
        ),
        ((run.contender, run.case, run.repeat, *request) for run in findings.runs for request in run.requests),
    )
    _write(
        folder / "steps.csv",
        ("contender", "case", "repeat", "start_s", "seconds", "sp", "tp", "tokens", "decodes"),
        ((run.contender, run.case, run.repeat, *step) for run in findings.runs for step in run.steps),
    )


SUMMARY_COLUMNS = (
    "protocol",
    "case",
    "x",
    "contender",
    "metric",
    "unit",
    "median",
    "low",
    "high",
    "ratio_to_best_static",
    "ratio_low",
    "ratio_high",
    "is_best",
    "foreign_cores",
)


def _summary_lines(findings: Findings) -> Iterable[Sequence[Any]]:
    for case in findings.cases:
        for row in rows_of(findings, case):
            value, ratio = row.value, row.ratio
            ratios = ("", "", "") if ratio is None else (ratio.median, ratio.low, ratio.high)
            yield (
                case.protocol,
                case.name,
                "" if case.x is None else case.x,
                row.contender,
                row.metric.key,
                row.metric.unit,
                value.median,
                value.low,
                value.high,
                *ratios,
                row.is_best,
                round(row.foreign_cores, 3),
            )


def _write(path: Path, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(lines)
