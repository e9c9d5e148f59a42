"""Timelines of requests, with the mode of every step below (Figs. 9 to 11 of the paper)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from ulysses_infer.bench.compare.findings import CaseInfo, ContenderRun, Findings, RequestRow
from ulysses_infer.bench.compare.plots.style import (
    COLOURS,
    DIM,
    GRID,
    SHORT_NAMES,
    SP,
    TP,
    heading,
    legend_of,
    mode_colour,
    plain_numbers,
)

PANELS = (("TTFT, s", "ttft"), ("TPOT, ms", "tpot"), ("Completion, s", "e2el"))
NUM_WINDOWS = 60  # windows of the running median


def timeline(findings: Findings, case: CaseInfo) -> Figure:
    """One dot per request at its arrival, a line for the running median, and a band of modes below."""
    runs = {name: findings.typical(name, case.name, "ttft_ms") for name in findings.contenders}
    shown = {name: run for name, run in runs.items() if run is not None and run.requests}
    bands = {name: run for name, run in shown.items() if run.steps}
    heights = [*([1.0] * len(PANELS)), 0.34, 0.16 + 0.17 * len(bands)]
    figure = Figure(figsize=(11.5, 2.0 + 1.42 * len(PANELS) + 0.42 + 0.26 * len(bands)))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0.34)
    end = max((run.seconds for run in shown.values()), default=1.0)
    for index, (title, key) in enumerate(PANELS):
        axes = figure.add_subplot(grid[index])
        for name, run in shown.items():
            _cloud(axes, run.requests, key, COLOURS[name], end)
        _label(axes, title, end)
    arrivals = figure.add_subplot(grid[len(PANELS)])
    _arrivals(arrivals, next(iter(shown.values())).requests if shown else [], end)
    _bands(figure.add_subplot(grid[len(PANELS) + 1]), bands, end)
    figure.subplots_adjust(left=0.075, right=0.99, bottom=0.5 / figure.get_size_inches()[1])
    heading(figure, _title(case), case.title, top=1.0)
    legend_of(figure, list(shown))
    return figure


def _title(case: CaseInfo) -> str:
    return {"bursty": "Bursts over a low base rate", "trace": "A production trace"}.get(case.protocol, case.name)


def _cloud(axes: Axes, requests: Sequence[RequestRow], key: str, colour: str, end: float) -> None:
    factor = 1e3 if key == "tpot" else 1.0
    points = [
        (request.sent, getattr(request, key) * factor)
        for request in requests
        if not request.error and getattr(request, key) is not None
    ]
    if not points:
        return
    moments, values = zip(*points, strict=True)
    axes.scatter(moments, values, s=9, color=colour, alpha=0.35, linewidths=0, zorder=2)
    moments, values = zip(*medians(points, end / NUM_WINDOWS), strict=True)
    axes.plot(moments, values, color=colour, linewidth=1.8, zorder=3)


def medians(points: Sequence[tuple[float, float]], width: float) -> list[tuple[float, float]]:
    """The median of each time window that has points."""
    windows: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        windows.setdefault(int(point[0] / max(width, 1e-9)), []).append(point)
    return [
        (statistics.fmean(x for x, _ in own), statistics.median(y for _, y in own))
        for _, own in sorted(windows.items())
    ]


def _label(axes: Axes, title: str, end: float) -> None:
    axes.set_title(title, fontsize=10, pad=5)
    axes.set_xlim(0, end)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=False)
    plain_numbers(axes)


def _arrivals(axes: Axes, requests: Sequence[RequestRow], end: float) -> None:
    """Draw a histogram of arrivals."""
    axes.hist([request.sent for request in requests], bins=150, range=(0, end), color=DIM, alpha=0.75)
    axes.set_title("Requests sent", fontsize=10, pad=5)
    axes.set_xlim(0, end)
    axes.set_yticks([])
    axes.tick_params(labelbottom=False)
    axes.spines["left"].set_visible(False)


def _bands(axes: Axes, runs: dict[str, ContenderRun], end: float) -> None:
    """One row per contender: every step in the colour of its mode, white while the engine was idle."""
    for row, run in enumerate(runs.values()):
        rectangles, colours = [], []
        axes.axhspan(row - 0.38, row + 0.38, color=GRID, linewidth=0, zorder=0)
        for step in run.steps:
            left, right = step.start, step.start + step.seconds
            rectangles.append([(left, row - 0.38), (left, row + 0.38), (right, row + 0.38), (right, row - 0.38)])
            colours.append(mode_colour(step.sp, step.tp))
        axes.add_collection(PolyCollection(rectangles, facecolors=colours, edgecolors=colours, linewidths=0.15))
    axes.set_title("Mode of each step", fontsize=10, pad=5)
    _mode_key(axes)
    axes.set_yticks(range(len(runs)), [SHORT_NAMES[name] for name in runs])
    axes.set_ylim(max(len(runs), 1) - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("seconds")


def _mode_key(axes: Axes) -> None:
    """Draw the legend of the band, at its top right."""
    for offset, text, colour in ((0, "■ TP", TP), (-38, "■ SP", SP), (-76, "■ 1 rank", COLOURS["dp"])):
        axes.annotate(
            text,
            (1, 1),
            xytext=(offset, 6),
            textcoords="offset points",
            xycoords="axes fraction",
            ha="right",
            color=colour,
            fontsize=9.5,
        )
