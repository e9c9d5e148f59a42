"""The result: a table for the terminal, Markdown for the documentation, plain values for a file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.compare_peers.catalogue import CONTENDERS, YARDSTICKS
from benchmarks.compare_peers.floors import Floors
from benchmarks.compare_peers.measuring import Measured, Repeat
from benchmarks.compare_peers.programs import LIMITS

Limits = Mapping[int, Floors]
"""The machine's limits by the bits of a weight; empty if they were not measured."""
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
    """One metric of one contender. Ratios are to contenders of equal bits."""

    median: float
    low: float
    high: float
    ratio: float | None
    """Of the median to the best peer's; None without any peer."""
    to_yardstick: float | None
    """The median over the rounds of the ratio to llama.cpp in the same round; None without it."""
    share: float | None
    """Of the machine's limit that is reached, 1 at best; None if it was not measured."""


def cells(measured: Measured, metric: Metric, limits: Limits) -> dict[str, Cell]:
    """A metric of every contender that was measured, in the order of the table."""
    values = {
        name: [metric.value(repeat) for repeat in measured.repeats[name]]
        for name in CONTENDERS
        if measured.repeats.get(name)
    }
    medians = {name: statistics.median(own) for name, own in values.items()}
    result = {}
    for name, own in values.items():
        bits = CONTENDERS[name].bits
        best = _best_peer(medians, metric, bits)
        limit = metric.limit(limits[bits]) if bits in limits else None
        result[name] = Cell(
            medians[name],
            min(own),
            max(own),
            medians[name] / best if best else None,
            _median_ratio(own, values.get(YARDSTICKS[bits], [])),
            None if limit is None else medians[name] / limit if metric.higher_is_better else limit / medians[name],
        )
    return result


def _best_peer(medians: Mapping[str, float], metric: Metric, bits: int) -> float | None:
    peers = [median for name, median in medians.items() if _is_peer(name) and CONTENDERS[name].bits == bits]
    return (max if metric.higher_is_better else min)(peers) if peers else None


def _is_peer(name: str) -> bool:
    return not CONTENDERS[name].is_ours


def _median_ratio(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Of the ratios in the same round; an interrupted round has only some contenders."""
    ratios = [value / other for value, other in zip(values, others, strict=False)]
    return statistics.median(ratios) if ratios else None


def best_of_ours(measured: Measured, metric: Metric, bits: int = 16) -> tuple[str, Cell] | None:
    """Our best contender of these bits by a metric."""
    found = cells(measured, metric, {}).items()
    ours = [(name, cell) for name, cell in found if not _is_peer(name) and CONTENDERS[name].bits == bits]
    if not ours:
        return None
    return (max if metric.higher_is_better else min)(ours, key=lambda pair: pair[1].median)


def table(measured: Measured, limits: Limits) -> Table:
    """One row per contender: for each metric the median, range, ratios to peers and share of the limit."""
    result = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    result.add_column("engine", no_wrap=True)
    columns = {metric: cells(measured, metric, limits) for metric in METRICS}
    for metric in METRICS:
        for title in (metric.title, "range", "of llama.cpp", "of best peer", "of limit"):
            result.add_column(title, justify="right", no_wrap=title == metric.title)
    for bits in YARDSTICKS:
        for name in (name for name in columns[METRICS[0]] if CONTENDERS[name].bits == bits):
            row: list[Text | str] = [Text(CONTENDERS[name].label, style="" if _is_peer(name) else "bold")]
            for metric in METRICS:
                cell = columns[metric][name]
                median, span, yardstick, ratio, share = texts(cell, metric)
                row += [Text(median, style="bold"), Text(span, style="dim")]
                row += [Text(yardstick, style=_style(cell.to_yardstick, metric))]
                row += [Text(ratio, style=_style(cell.ratio, metric)), share]
            result.add_row(*row)
        if bits in limits and any(CONTENDERS[name].bits == bits for name in columns[METRICS[0]]):
            figures = [(limit, "", "", "", "") for limit in limit_texts(limits[bits])]
            result.add_row(limit_label(bits), *(text for five in figures for text in five), style="dim")
            result.add_section()
    return result


def texts(cell: Cell, metric: Metric) -> tuple[str, str, str, str, str]:
    """A cell's median, range, ratio to llama.cpp, ratio to the best peer and share of the limit, to print."""
    return (
        f"{cell.median:.{metric.digits}f}",
        f"{cell.low:.{metric.digits}f}..{cell.high:.{metric.digits}f}",
        "" if cell.to_yardstick is None else f"{cell.to_yardstick:.2f}x",
        "" if cell.ratio is None else f"{cell.ratio:.2f}x",
        "" if cell.share is None else f"{cell.share:.0%}",
    )


def limit_label(bits: int) -> str:
    """The name of a row of limits."""
    return f"the machine's limit, {bits} bits"


def limit_texts(limits: Floors) -> list[str]:
    """One per metric, to print."""
    return [f"{metric.limit(limits):.{metric.digits}f}" for metric in METRICS]


def _style(ratio: float | None, metric: Metric) -> str:
    if ratio is None or ratio == 1:
        return ""
    return "green" if (ratio > 1) == metric.higher_is_better else "red"


def notes(measured: Measured) -> list[str]:
    """Notes to the table, one line each: limits, best ratios, load by other programs, missing contenders."""
    lines = []
    if measured.limits:
        bandwidth, matmul = machine(measured)
        lines.append(f"limits: memory read at {bandwidth / 1e9:.1f} GB/s, products at {matmul / 1e12:.2f} TFLOP/s")
    lines += [line for bits in YARDSTICKS for metric in METRICS for line in _ratio_lines(measured, metric, bits)]
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


def _ratio_lines(measured: Measured, metric: Metric, bits: int) -> list[str]:
    best = best_of_ours(measured, metric, bits)
    if best is None or best[1].ratio is None:
        return []
    name, cell = best
    yardstick = "" if cell.to_yardstick is None else f"{cell.to_yardstick:.2f} x {CONTENDERS[YARDSTICKS[bits]].label}, "
    label = CONTENDERS[name].label.removeprefix("ours, ")
    return [f"{bits} bits, best of ours by {metric.title}: {yardstick}{cell.ratio:.2f} x the best peer ({label})"]


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


def reached(measured: Measured, limits: Limits) -> Limits:
    """The limits, none below what any engine of as many bits or more reached in any round."""
    result = {}
    for bits, own in limits.items():
        for name, repeats in measured.repeats.items():
            for repeat in repeats if CONTENDERS[name].bits >= bits else []:
                own = own.including(repeat.ttft, repeat.tpot, repeat.throughput)
        result[bits] = own
    return result


def markdown(title: str, measured: Measured, limits: Limits) -> str:
    """A section for the documentation."""
    header = ["engine", *(f"{metric.title} | of llama.cpp | of best peer | of limit" for metric in METRICS)]
    lines = [f"### {title}", "", f"| {' | '.join(header)} |", "|---|" + "---:|" * 4 * len(METRICS)]
    columns = {metric: cells(measured, metric, limits) for metric in METRICS}
    for bits in YARDSTICKS:
        names = [name for name in columns[METRICS[0]] if CONTENDERS[name].bits == bits]
        for name in names:
            row = [CONTENDERS[name].label]
            for metric in METRICS:
                median, span, *others = texts(columns[metric][name], metric)
                row += [f"{median} ({span})", *others]
            lines.append(f"| {' | '.join(row)} |")
        if names and bits in limits:
            row = [f"{limit} | | | " for limit in limit_texts(limits[bits])]
            lines.append(f"| {limit_label(bits)} | {'| '.join(row)}|")
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(measured)), ""])


def as_values(measured: Measured, limits: Limits) -> dict[str, Any]:
    """All measurements, and the figures computed from them."""
    return {
        "contenders": {
            name: {
                "label": CONTENDERS[name].label,
                "bits": CONTENDERS[name].bits,
                "repeats": [asdict(repeat) for repeat in own],
                **{metric.key: asdict(cells(measured, metric, limits)[name]) for metric in METRICS},
            }
            for name, own in measured.repeats.items()
        },
        "limits": measured.limits,
        "floors": {str(bits): asdict(own) for bits, own in limits.items()},
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
