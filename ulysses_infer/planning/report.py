"""Writes the report of a plan: one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ulysses_infer.bench.compare.plots.style import mode_colour, plain_numbers, styled
from ulysses_infer.cache.budget import GIB
from ulysses_infer.errors import ConfigError, first_line
from ulysses_infer.planning.planner import Evaluation, Plan, Planner
from ulysses_infer.planning.table import verdict
from ulysses_infer.planning.workload import describe
from ulysses_infer.step_time.step_shape import StepShape

TEMPLATE = Path(__file__).with_name("report.html.j2")
SIZE = (11.0, 4.2)  # inches
BINS = 240
COUNTS = [round(2 ** (step / 4)) for step in range(4 * 13 + 1)]
WIDE = 8  # ratio of values from which an axis is logarithmic
NAME_WIDTH, NAME_HEIGHT = 0.22, 0.06  # of a name in a picture, as shares of it
DARK: dict[Any, Any] = {
    "figure.facecolor": "#171c24", "axes.facecolor": "#171c24", "savefig.facecolor": "#171c24", "text.color": "#e6e9ee",
    "axes.edgecolor": "#4a5361", "axes.labelcolor": "#98a2b0", "grid.color": "#262d38", "xtick.color": "#98a2b0",
    "ytick.color": "#98a2b0",
}  # fmt: skip
STYLES = ("-", "--", ":")  # of modes that share a colour
COLOURS = {"static": "#7d8794", "threshold": "#3d55d4", "adaptive": "#d96b3c"}


def write_report(path: Path, planner: Planner, plan: Plan, price: float | None = None) -> None:
    """Write the page. price: of one device for an hour. Raises `ConfigError` if it cannot be written."""
    page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True).render(
        plan=plan,
        workload=describe(plan.rows),
        verdict=verdict(plan),
        pictures=zip(_pictures(planner, plan, {}), _pictures(planner, plan, DARK), strict=True),
        front={str(evaluation.candidate) for evaluation in plan.pareto},
        gib=GIB,
        price=price,
        max_num_seqs=planner.config.scheduler.max_num_seqs,
        colour=lambda mode: mode_colour(*mode),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report '{path}' cannot be written: {first_line(error)}") from error


def _pictures(planner: Planner, plan: Plan, colours: dict[Any, Any]) -> list[tuple[str, str]]:
    """(title, data URL) of each picture, in these colours."""
    with styled(), matplotlib.rc_context(colours):
        pictures = [
            ("Median latencies of every candidate; the area of a point is its throughput", _plane(plan)),
            (f"{plan.best.candidate}: batched tokens and modes over time", _timeline(plan.best)),
            ("Step time by prompt tokens, and where the modes cross", _crossover(planner, plan)),
        ]
        return [(title, _data(figure)) for title, figure in pictures]


def _plane(plan: Plan) -> Figure:
    """Median time per token against median time to first token. Adaptive candidates are rings around others."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    most = max(evaluation.figures.tokens_per_second for evaluation in plan.evaluations)
    for policy, colour in COLOURS.items():
        own = [evaluation for evaluation in plan.evaluations if evaluation.candidate.policy == policy]
        if not own:
            continue
        sizes = [30 + 150 * evaluation.figures.tokens_per_second / most for evaluation in own]
        x, y = ([getattr(e.figures, name).p50 for e in own] for name in ("ttft", "tpot"))
        if policy == "adaptive":
            axes.scatter(x, y, [2 * size for size in sizes], facecolors="none", edgecolors=colour, label=policy)
        else:
            axes.scatter(x, y, sizes, color=colour, alpha=0.8, label=policy, linewidths=0)
    axes.set(xlabel="median time to first token, ms", ylabel="median time per token, ms")
    for axis, name, set_scale in ((axes.xaxis, "ttft", axes.set_xscale), (axes.yaxis, "tpot", axes.set_yscale)):
        values = [getattr(evaluation.figures, name).p50 for evaluation in plan.evaluations]
        if min(values) > 0 and max(values) > WIDE * min(values):
            set_scale("log")
        _plain_ticks(axis)
    axes.margins(0.08, 0.14)
    _name_front(axes, plan.pareto)
    figure.legend(loc="outside right upper", markerscale=0.5)
    return figure


def _name_front(axes: Axes, front: Sequence[Evaluation]) -> None:
    """Names the points of the front, one name per point, where they have room."""
    named = {(e.figures.ttft.p50, e.figures.tpot.p50): str(e.candidate) for e in reversed(front)}
    placed: list[tuple[float, float]] = []
    for point, name in sorted(named.items()):
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(point))
        if all(abs(x - other) > NAME_WIDTH or abs(y - low) > NAME_HEIGHT for other, low in placed):
            side = -1 if x > 1 - NAME_WIDTH else 1
            place, align = (0, -11), "left" if side == 1 else "right"  # below the rings of its neighbours
            axes.annotate(
                name, point, place, textcoords="offset points", fontsize=8.5, color=_dim(), ha=align, va="top"
            )
            placed.append((x, y))


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
    plain_numbers(above)
    figure.legend(loc="outside right upper")
    below.set(yticks=[], xlabel="seconds", ylabel="mode")
    return figure


def _crossover(planner: Planner, plan: Plan) -> Figure:
    """Step time of every mode of the layouts with one replica, or of the best layout."""
    lone = [layout for layout in planner.usable if layout.dp == 1] or [plan.best.candidate.layout]
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    drawn = dict.fromkeys(mode for layout in lone for mode in layout.modes)
    times = {mode: planner.times(layout) for layout in lone for mode in layout.modes}
    for mode in drawn:
        seconds = [1e3 * times[mode].seconds(mode, StepShape.of([], [(0, count)])) for count in COUNTS]
        colour = mode_colour(*mode)
        style = STYLES[[mode_colour(*other) for other in drawn if other < mode].count(colour) % len(STYLES)]
        axes.plot(COUNTS, seconds, label=str(mode), color=colour, linestyle=style)
    axes.set(xlabel="prompt tokens of the step", ylabel="ms per step")
    axes.set(xscale="log", yscale="log")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    crossings = sorted({tokens for layout in lone if (tokens := plan.crossovers[str(layout)])})
    for number, tokens in enumerate(crossings):  # one below the other: they are often close
        axes.axvline(tokens, color=_dim(), linewidth=0.8, linestyle=(0, (3, 3)))
        place = tokens, 1 - 0.06 * number
        axes.annotate(f" {tokens:,}", place, xycoords=("data", "axes fraction"), va="top", fontsize=8.5, color=_dim())
    axes.legend(loc="upper left")
    return figure


def _plain_ticks(axis: Axis) -> None:
    """Numbers without exponents; on logarithmic axes also at 2 and 5 of each decade."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "25" else ""))


def _dim() -> str:
    return str(matplotlib.rcParams["axes.labelcolor"])


def _data(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
