"""A metric over context length or arrival rate, one line per contender."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ulysses_infer.bench.compare.comparison import METRICS, rows_of
from ulysses_infer.bench.compare.findings import CaseInfo, Findings
from ulysses_infer.bench.compare.plots.style import COLOURS, empty, heading, legend_of, number, plain_numbers

SPREAD_FOR_LOGARITHM = 8.0  # largest to smallest value of x


def context_sweep(findings: Findings) -> Figure:
    """TTFT and TPOT of a single request, throughput when saturated."""
    panels = [("lone", "ttft_ms"), ("lone", "tpot_ms"), ("saturated", "tokens_per_second")]
    return _sweep(findings, "context", "Over the context length", "prompt tokens", panels)


def rate_sweep(findings: Findings) -> Figure:
    """TTFT, TPOT and completion time over the arrival rate."""
    panels = [("timed", "ttft_ms"), ("timed", "tpot_ms"), ("timed", "e2el_ms")]
    return _sweep(findings, "rate", "Over the arrival rate", "requests per second, Poisson", panels)


def _sweep(findings: Findings, protocol: str, title: str, x_title: str, panels: list[tuple[str, str]]) -> Figure:
    figure = Figure(figsize=(11.5, 4.1))
    cases = findings.protocol(protocol)
    for index, (kind, key) in enumerate(panels):
        axes = figure.add_subplot(1, 3, index + 1)
        metric = METRICS[key]
        name = "Combined throughput" if metric.unit == "tok/s" else f"{metric.title[:1].upper()}{metric.title[1:]}"
        axes.set_title(f"{name}, {metric.unit}", fontsize=10.5)
        _lines(axes, findings, [case for case in cases if case.kind == kind], key)
        axes.set_xlabel(x_title)
    figure.subplots_adjust(left=0.055, right=0.99, bottom=0.14, wspace=0.22)
    about = findings.about
    subtitle = f"{about.get('model', '')} on {about.get('num_ranks', '?')} ranks · medians and ranges over repeats"
    heading(figure, title, subtitle, top=1.12)
    legend_of(figure, [name for name in findings.contenders if name in COLOURS])
    return figure


def _lines(axes: Axes, findings: Findings, cases: list[CaseInfo], key: str) -> None:
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for case in sorted(cases, key=lambda case: case.x or 0.0):
        for row in rows_of(findings, case):
            if row.metric.key == key:
                value = row.value
                points.setdefault(row.contender, []).append((case.x or 0.0, value.median, value.low, value.high))
    if not points:
        empty(axes, "no data")
        return
    for name, own in points.items():
        x, median, low, high = zip(*own, strict=True)
        axes.vlines(x, low, high, color=COLOURS[name], alpha=0.45, linewidth=1.3)
        axes.plot(x, median, color=COLOURS[name], linewidth=2.2, marker="o", markersize=5, zorder=3)
    axes.set_ylim(bottom=0)
    plain_numbers(axes)
    _x_axis(axes, sorted({case.x for case in cases if case.x is not None}))


def _x_axis(axes: Axes, values: list[float]) -> None:
    if values[-1] / max(values[0], 1e-9) > SPREAD_FOR_LOGARITHM:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: number(value)))
