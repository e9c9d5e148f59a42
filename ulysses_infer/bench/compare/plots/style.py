"""The style of all plots: colours as on the dashboard, large type, light axes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

TEXT, DIM, LINE, GRID, PAGE = "#1a2029", "#69727f", "#c5cbd5", "#edeff3", "#ffffff"
SP, TP, BOTH = "#0e9db5", "#b844bd", "#d09a1e"
COLOURS = {"dp": "#7d8794", "tp": TP, "sp": SP, "shift": "#3d55d4", "adaptive": "#d96b3c"}
COLOURS |= {"ngram": "#2f9e6e", "suffix": "#8a6d3b", "draft_model": "#d0454c", "mtp": "#5b8c2a", "eagle3": "#3b7a99"}
NAMES = {"dp": "DP", "tp": "TP", "sp": "SP", "shift": "Shift, threshold", "adaptive": "Shift, adaptive"}
NAMES |= {"ngram": "N-grams", "suffix": "Suffixes", "draft_model": "Draft model", "mtp": "MTP", "eagle3": "EAGLE-3"}
SHORT_NAMES = {**NAMES, "shift": "Shift", "adaptive": "Adaptive"}
DOTS_PER_INCH = 160
SETTINGS: dict[Any, Any] = {
    "figure.facecolor": PAGE,
    "axes.facecolor": PAGE,
    "savefig.facecolor": PAGE,
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "axes.labelcolor": DIM,
    "axes.labelsize": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.solid_capstyle": "round",
    "savefig.dpi": DOTS_PER_INCH,
}


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style to figures made and saved in this block only."""
    with matplotlib.rc_context(SETTINGS):
        yield


def mode_colour(sp: int, tp: int) -> str:
    """The colour of a mode on every display: see `console.screen.mode_style`."""
    if sp > 1:
        return SP if tp == 1 else BOTH
    return TP if tp > 1 else COLOURS["dp"]


def heading(figure: Figure, title: str, subtitle: str, top: float) -> None:
    """A title and subtitle at the top left; `top` inches are reserved for them."""
    height = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.13 / height, title, fontsize=15, fontweight="bold", va="top", ha="left")
    figure.text(0.012, 1 - 0.44 / height, subtitle, fontsize=10, color=DIM, va="top", ha="left")
    figure.subplots_adjust(top=1 - top / height)


def legend_of(figure: Figure, contenders: list[str]) -> None:
    """The legend of contenders, at the top right."""
    handles = [matplotlib.lines.Line2D([], [], color=COLOURS[name], linewidth=5) for name in contenders]
    height = figure.get_size_inches()[1]
    figure.legend(
        handles,
        [NAMES[name] for name in contenders],
        loc="upper right",
        ncols=len(contenders),
        bbox_to_anchor=(0.995, 1 - 0.05 / height),
        handlelength=0.9,
        columnspacing=1.4,
        handletextpad=0.5,
    )


def plain_numbers(axes: Axes) -> None:
    """Set few ticks, with thousands separators."""
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: number(value)))


def number(value: float) -> str:
    """A number with about three digits."""
    if value >= 100_000:
        return f"{value / 1000:,.0f}k"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def empty(axes: Axes, text: str) -> None:
    """Write `text` into axes without data."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=DIM)
