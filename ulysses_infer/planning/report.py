"""Writes the report of a plan: one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ulysses_infer.bench.compare.plots.style import DIM, mode_colour, styled
from ulysses_infer.cache.budget import GIB
from ulysses_infer.errors import ConfigError, first_line
from ulysses_infer.planning.planner import Evaluation, Plan, Planner
from ulysses_infer.planning.workload import describe
from ulysses_infer.step_time.step_shape import StepShape

TEMPLATE = Path(__file__).with_name("report.html.j2")
SIZE = (11.0, 4.2)  # inches
BINS = 240
COUNTS = [round(2 ** (step / 4)) for step in range(4 * 13 + 1)]
COLOURS = {"static": "#7d8794", "threshold": "#3d55d4", "adaptive": "#d96b3c"}


def write_report(path: Path, planner: Planner, plan: Plan) -> None:
    """Write the page. Raises `ConfigError` if that is not possible."""
    with styled():
        pictures = [
            ("Latency and throughput of every candidate", _plane(plan)),
            (f"{plan.best.candidate}: batched tokens and modes over time", _timeline(plan.best)),
            ("Step time by prompt tokens", _crossover(planner, plan)),
        ]
        page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True).render(
            plan=plan,
            workload=describe(plan.rows),
            pictures=[(title, _data(figure)) for title, figure in pictures],
            front={str(evaluation.candidate) for evaluation in plan.pareto},
            gib=GIB,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report '{path}' cannot be written: {first_line(error)}") from error


def _plane(plan: Plan) -> Figure:
    """Median time per token against median time to first token; the area of a point is its throughput."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    most = max(evaluation.figures.tokens_per_second for evaluation in plan.evaluations)
    for policy, colour in COLOURS.items():
        own = [evaluation for evaluation in plan.evaluations if evaluation.candidate.policy == policy]
        sizes = [30 + 150 * evaluation.figures.tokens_per_second / most for evaluation in own]
        x, y = ([getattr(e.figures, name).p50 for e in own] for name in ("ttft", "tpot"))
        axes.scatter(x, y, sizes, color=colour, alpha=0.75, label=policy, linewidths=0)
    named = {(e.figures.ttft.p50, e.figures.tpot.p50): e for e in reversed(plan.pareto)}  # one name per point
    for point, evaluation in named.items():
        axes.annotate(str(evaluation.candidate), point, (6, 5), textcoords="offset points", fontsize=8, color=DIM)
    axes.set(xlabel="median time to first token, ms", ylabel="median time per token, ms")
    _logarithmic(axes)
    axes.legend()
    return figure


def _timeline(evaluation: Evaluation) -> Figure:
    """Tokens per second by mode; below, which mode ran."""
    steps = evaluation.replica.timeline
    end = max(start + seconds for start, seconds, _, _ in steps)
    width = end / BINS
    figure = Figure(figsize=SIZE, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    bottom = [0.0] * BINS
    for mode in sorted({mode for _, _, mode, _ in steps}):
        heights = [0.0] * BINS
        for start, _, own, tokens in steps:
            if own == mode:
                heights[min(int(start / width), BINS - 1)] += tokens / width
        places = [(number + 0.5) * width for number in range(BINS)]
        above.bar(places, heights, width, bottom, color=mode_colour(*mode), label=str(mode))
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
        spans = [(start, seconds) for start, seconds, own, _ in steps if own == mode]
        below.broken_barh(spans, (0, 1), color=mode_colour(*mode))
    above.set(ylabel="tokens per second")
    above.legend()
    below.set(yticks=[], xlabel="seconds", ylabel="mode")
    return figure


def _crossover(planner: Planner, plan: Plan) -> Figure:
    """Step time of every mode of the layouts with one replica, or of the best layout."""
    lone = [layout for layout in planner.usable if layout.dp == 1] or [plan.best.candidate.layout]
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    drawn = set()
    for layout in lone:
        times = planner.times(layout)
        for mode in layout.modes:
            if mode not in drawn:
                seconds = [1e3 * times.seconds(mode, StepShape.of([], [(0, count)])) for count in COUNTS]
                axes.plot(COUNTS, seconds, label=str(mode))
                drawn.add(mode)
    axes.set(xlabel="prompt tokens of the step", ylabel="ms per step")
    _logarithmic(axes)
    axes.legend()
    return figure


def _logarithmic(axes: Axes) -> None:
    """Both axes, with plain numbers."""
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "25" else ""))


def _data(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
