"""Cumulative distributions of latencies over all repeats of a case."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ulysses_infer.bench.compare.findings import CaseInfo, Findings
from ulysses_infer.bench.compare.plots.style import COLOURS, empty, heading, legend_of, number

PANELS = (("TTFT, ms", "ttft"), ("TPOT, ms", "tpot"), ("Completion, ms", "e2el"))
SPREAD_FOR_LOGARITHM = 30.0  # largest to smallest value
LEAST = 0.1  # ms; smaller values are drawn here


def cumulative(findings: Findings, case: CaseInfo) -> Figure:
    """One panel each for TTFT, TPOT and completion time."""
    figure = Figure(figsize=(11.5, 3.9))
    for index, (title, key) in enumerate(PANELS):
        axes = figure.add_subplot(1, 3, index + 1)
        axes.set_title(title, fontsize=10.5)
        _curves(axes, findings, case, key)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.09, wspace=0.16)
    heading(figure, "Cumulative distribution of latencies", case.title, top=1.12)
    legend_of(figure, [name for name in findings.contenders if findings.of(name, case.name)])
    return figure


def _curves(axes: Axes, findings: Findings, case: CaseInfo, key: str) -> None:
    largest, smallest = 0.0, float("inf")
    for name in findings.contenders:
        values = _values(findings, case, name, key)
        if values:
            shares = [(index + 1) / len(values) for index in range(len(values))]
            axes.plot([values[0], *values], [0.0, *shares], color=COLOURS[name], linewidth=2.1, drawstyle="steps-post")
            largest, smallest = max(largest, values[-1]), min(smallest, max(values[0], LEAST))
    if not largest:
        empty(axes, "no data")
        return
    if largest / max(smallest, 1e-9) > SPREAD_FOR_LOGARITHM:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=smallest * 0.8)
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: number(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.0%}"))
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(visible=True, axis="both")


def _values(findings: Findings, case: CaseInfo, name: str, key: str) -> list[float]:
    requests = [request for run in findings.of(name, case.name) for request in run.requests if not request.error]
    return sorted(value * 1e3 for request in requests if (value := getattr(request, key)) is not None)
