"""Bar charts of latency and throughput (Fig. 12 of the paper)."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ulysses_infer.bench.compare.comparison import METRICS, STATIC, ComparisonRow, rows_of
from ulysses_infer.bench.compare.findings import CaseInfo, Findings
from ulysses_infer.bench.compare.plots.style import (
    COLOURS,
    DIM,
    PAGE,
    SHORT_NAMES,
    TEXT,
    empty,
    heading,
    number,
    plain_numbers,
)

PANELS = (
    ("lone", "ttft_ms", "Time to first token", "ms, a single request · lower is better"),
    ("lone", "tpot_ms", "Time per output token", "ms, a single request · lower is better"),
    ("saturated", "tokens_per_second", "Combined throughput", "tokens/s, saturated · higher is better"),
)


def shape_bars(findings: Findings) -> Figure:
    """One panel each for TTFT, TPOT and throughput; whiskers show the range over repeats."""
    figure = Figure(figsize=(11.5, 4.3))
    cases = {case.kind: case for case in findings.protocol("shape")}
    for index, (kind, key, title, unit) in enumerate(PANELS):
        axes = figure.add_subplot(1, 3, index + 1)
        axes.set_title(f"{title}\n", pad=6)
        axes.text(0, 1.045, unit, transform=axes.transAxes, fontsize=9, color=DIM)
        if kind in cases:
            _bars(axes, _rows(findings, cases[kind], key))
    figure.subplots_adjust(left=0.055, right=0.99, bottom=0.085, wspace=0.24)
    heading(figure, "Latency and throughput", _subtitle(findings, list(cases.values())), top=1.25)
    return figure


def _rows(findings: Findings, case: CaseInfo, key: str) -> list[ComparisonRow]:
    return [row for row in rows_of(findings, case) if row.metric is METRICS[key]]


def _subtitle(findings: Findings, cases: list[CaseInfo]) -> str:
    about = findings.about
    words = cases[0].title.partition(", ")[2] if cases else ""
    return f"{about.get('model', '')} on {about.get('num_ranks', '?')} ranks · {words}"


def _bars(axes: Axes, rows: list[ComparisonRow]) -> None:
    if not rows:
        empty(axes, "no data")
        return
    tallest = max(row.value.high for row in rows)
    for position, row in enumerate(rows):
        value = row.value
        axes.bar(position, value.median, width=0.66, color=COLOURS[row.contender], zorder=2)
        if value.high > value.low:
            axes.plot([position] * 2, [value.low, value.high], color=TEXT, linewidth=1.1, alpha=0.65, zorder=3)
        axes.text(
            position,
            value.high + tallest * 0.02,
            number(value.median),
            ha="center",
            va="bottom",
            fontsize=10,
            fontweight="bold" if row.is_best else "normal",
            color=TEXT if row.is_best else DIM,
            bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 0.8},
            zorder=4,
        )
    _mark_static(axes, rows)
    axes.set_xticks(range(len(rows)), [SHORT_NAMES[row.contender] for row in rows])
    axes.set_ylim(0, tallest * 1.14)
    plain_numbers(axes)


def _mark_static(axes: Axes, rows: list[ComparisonRow]) -> None:
    """Draw a line at the better of TP and SP, the target for shift."""
    medians = [row.value.median for row in rows if row.contender in STATIC]
    if medians:
        best = (max if rows[0].metric.higher_is_better else min)(medians)
        axes.axhline(best, color=TEXT, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.55, zorder=1)
