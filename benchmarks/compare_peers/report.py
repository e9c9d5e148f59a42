"""The result: a table for the terminal, Markdown for the documentation, plain values for a file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.compare_peers.catalogue import CONTENDERS, LIMITS
from benchmarks.compare_peers.floors import Floors
from benchmarks.compare_peers.measuring import Measured, Repeat

MAX_FOREIGN_CORES = 0.1  # above this use by other programs, figures are not reliable


@dataclass(frozen=True)
class Metric:
    """A figure measured in every repeat."""

    key: str
    title: str
    value: Callable[[Repeat], float]
    limit: Callable[[Floors], float]
    higher_is_better: bool = False
    digits: int = 1


METRICS = (
    Metric("ttft_ms", "TTFT ms", lambda repeat: repeat.ttft * 1e3, lambda floors: floors.ttft * 1e3),
    Metric("tpot_ms", "TPOT ms", lambda repeat: repeat.tpot * 1e3, lambda floors: floors.tpot * 1e3, digits=2),
    Metric("tokens_per_second", "tokens/s", lambda repeat: repeat.throughput, lambda most: most.throughput, True, 0),
)


@dataclass(frozen=True)
class Cell:
    """One metric of one contender."""

    median: float
    low: float
    high: float
    ratio: float | None
    """Of the median to the best peer's; None without any peer."""
    share: float | None
    """Of the machine's limit that is reached, 1 at best; None if it was not measured."""


def cells(measured: Measured, metric: Metric, limits: Floors | None) -> dict[str, Cell]:
    """A metric of every contender that was measured, in the order of the table."""
    values = {
        name: [metric.value(repeat) for repeat in measured.repeats[name]]
        for name in CONTENDERS
        if measured.repeats.get(name)
    }
    medians = {name: statistics.median(own) for name, own in values.items()}
    peers = [medians[name] for name in medians if not CONTENDERS[name].is_ours]
    best = (max if metric.higher_is_better else min)(peers) if peers else None
    limit = metric.limit(limits) if limits else None
    return {
        name: Cell(
            medians[name],
            min(own),
            max(own),
            medians[name] / best if best else None,
            None if limit is None else medians[name] / limit if metric.higher_is_better else limit / medians[name],
        )
        for name, own in values.items()
    }


def best_of_ours(measured: Measured, metric: Metric) -> tuple[str, Cell] | None:
    """Our best contender by a metric."""
    ours = [(name, cell) for name, cell in cells(measured, metric, None).items() if CONTENDERS[name].is_ours]
    if not ours:
        return None
    return (max if metric.higher_is_better else min)(ours, key=lambda pair: pair[1].median)


def table(measured: Measured, limits: Floors | None) -> Table:
    """One row per contender: for each metric the median, range, ratio to the best peer and share of the limit."""
    result = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    result.add_column("engine", no_wrap=True)
    columns = {metric: cells(measured, metric, limits) for metric in METRICS}
    for metric in METRICS:
        for title in (metric.title, "range", "of best peer", "of limit"):
            result.add_column(title, justify="right", no_wrap=title == metric.title)
    for name in next(iter(columns.values())):
        row: list[Text | str] = [Text(CONTENDERS[name].label, style="bold" if CONTENDERS[name].is_ours else "")]
        for metric in METRICS:
            cell = columns[metric][name]
            median, span, ratio, share = texts(cell, metric)
            row += [Text(median, style="bold"), Text(span, style="dim"), Text(ratio, style=_style(cell, metric)), share]
        result.add_row(*row)
    if limits:
        row_of_limits = [(f"{metric.limit(limits):.{metric.digits}f}", "", "", "") for metric in METRICS]
        result.add_section()
        result.add_row("the machine's limit", *(text for four in row_of_limits for text in four), style="dim")
    return result


def texts(cell: Cell, metric: Metric) -> tuple[str, str, str, str]:
    """A cell's median, range, ratio and share, to print."""
    return (
        f"{cell.median:.{metric.digits}f}",
        f"{cell.low:.{metric.digits}f}..{cell.high:.{metric.digits}f}",
        "" if cell.ratio is None else f"{cell.ratio:.2f}x",
        "" if cell.share is None else f"{cell.share:.0%}",
    )


def _style(cell: Cell, metric: Metric) -> str:
    if cell.ratio is None or cell.ratio == 1:
        return ""
    return "green" if (cell.ratio > 1) == metric.higher_is_better else "red"


def notes(measured: Measured) -> list[str]:
    """Notes to the table, one line each: limits, best ratios, load by other programs, missing contenders."""
    lines = []
    if measured.limits:
        bandwidth, matmul = machine(measured)
        lines.append(f"limits: memory read at {bandwidth / 1e9:.1f} GB/s, products at {matmul / 1e12:.2f} TFLOP/s")
    for metric in METRICS:
        best = best_of_ours(measured, metric)
        if best is not None and best[1].ratio is not None:
            name = CONTENDERS[best[0]].label.removeprefix("ours, ")
            lines.append(f"best of ours by {metric.title}: {best[1].ratio:.2f} x the best peer ({name})")
    foreign = [repeat.foreign_cores for own in measured.repeats.values() for repeat in own]
    if foreign:
        busy = sum(cores > MAX_FOREIGN_CORES for cores in foreign)
        warning = f"; in {busy} of {len(foreign)} measurements too much (> {MAX_FOREIGN_CORES})" if busy else ""
        typical, most = statistics.median(foreign), max(foreign)
        lines.append(f"other programs kept {typical:.2f} cores busy (median), {most:.2f} at most{warning}")
    lines += [f"{name}: not measured: {reason}" for name, reason in missing(measured).items()]
    versions = {name: version for name, version in measured.versions.items() if name != LIMITS}
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return lines


def missing(measured: Measured) -> dict[str, str]:
    """Programs and contenders that failed, each reason once."""
    return {
        name: reason
        for name, reason in measured.unavailable.items()
        if name not in CONTENDERS
        or measured.unavailable.get(CONTENDERS[name].program, "") != reason
        or CONTENDERS[name].program == name
    }


def machine(measured: Measured) -> tuple[float, float]:
    """Bandwidth and matmul rate: the best of the rounds."""
    return (
        max(limit["bandwidth"] for limit in measured.limits),
        max(limit["matmul"] for limit in measured.limits),
    )


def reached(measured: Measured, limits: Floors) -> Floors:
    """The limits, none below what any engine reached in any round."""
    for repeat in (repeat for own in measured.repeats.values() for repeat in own):
        limits = limits.including(repeat.ttft, repeat.tpot, repeat.throughput)
    return limits


def markdown(title: str, measured: Measured, limits: Floors | None) -> str:
    """A section for the documentation."""
    header = ["engine", *(f"{metric.title} | of best peer | of limit" for metric in METRICS)]
    lines = [f"### {title}", "", f"| {' | '.join(header)} |", "|---|" + "---:|" * 9]
    columns = {metric: cells(measured, metric, limits) for metric in METRICS}
    for name in next(iter(columns.values())):
        row = [CONTENDERS[name].label]
        for metric in METRICS:
            median, span, ratio, share = texts(columns[metric][name], metric)
            row += [f"{median} ({span})", ratio, share]
        lines.append(f"| {' | '.join(row)} |")
    if limits:
        row = [f"{metric.limit(limits):.{metric.digits}f} | | " for metric in METRICS]
        lines.append(f"| the machine's limit | {'| '.join(row)}|")
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(measured)), ""])


def as_values(measured: Measured, limits: Floors | None) -> dict[str, Any]:
    """All measurements, and the figures computed from them."""
    return {
        "contenders": {
            name: {
                "label": CONTENDERS[name].label,
                "repeats": [asdict(repeat) for repeat in own],
                **{metric.key: asdict(cells(measured, metric, limits)[name]) for metric in METRICS},
            }
            for name, own in measured.repeats.items()
        },
        "limits": measured.limits,
        "floors": asdict(limits) if limits else None,
        "versions": measured.versions,
        "unavailable": missing(measured),
    }


def same_tokens(found: Mapping[str, list[int] | str]) -> Table:
    """The first tokens of every contender, and whether they are transformers'."""
    reference = found.get("transformers")
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, title="the first tokens in float32", title_justify="left")
    for column in ("engine", "tokens", "as transformers"):
        result.add_column(column)
    for name, tokens in found.items():
        same = "" if not isinstance(reference, list) else "yes" if tokens == reference else "NO"
        shown = tokens if isinstance(tokens, str) else " ".join(map(str, tokens))
        result.add_row(CONTENDERS[name].label, shown, same if isinstance(tokens, list) else "")
    return result
