"""Writes the report: PNG plots and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from ulysses_infer.bench.compare.comparison import METRICS, METRICS_OF, ComparisonRow, Spread, remarks, rows_of
from ulysses_infer.bench.compare.findings import CaseInfo, Findings
from ulysses_infer.bench.compare.plots.bars import shape_bars
from ulysses_infer.bench.compare.plots.distributions import cumulative
from ulysses_infer.bench.compare.plots.style import COLOURS, NAMES, styled
from ulysses_infer.bench.compare.plots.sweeps import context_sweep, rate_sweep
from ulysses_infer.bench.compare.plots.timelines import timeline
from ulysses_infer.bench.compare.protocols import LONE, REPETITION, TIMED

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
HEADINGS = {
    "shape": "One shape",
    "context": "Context length",
    "rate": "Arrival rate",
    "bursty": "Bursts",
    REPETITION: "Answers that repeat their prompts",
    "trace": "Production traces",
}
EVEN = 0.02  # ratios this close to 1 count as equal


@dataclass(frozen=True)
class Picture:
    """A plot in the report."""

    name: str
    title: str
    png: bytes

    @property
    def data(self) -> str:
        """As a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Section:
    """A protocol with its plots and tables."""

    name: str
    title: str
    pictures: list[Picture]
    tables: list[dict[str, Any]]
    is_open: bool
    """Whether tables are expanded: those of sweeps are not, because their plots show the same."""


def write_report(findings: Findings, folder: Path) -> Path:
    """Write the PNGs and the page; returns the page."""
    sections = [_section(findings, name) for name in HEADINGS if findings.protocol(name)]
    for section in sections:
        for picture in section.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
    path = folder / PAGE
    path.write_text(render(findings, sections), encoding="utf-8")
    return path


def _section(findings: Findings, protocol: str) -> Section:
    pictures = [Picture(name, title, as_png(make)) for name, title, make in _figures(findings, protocol)]
    tables = [table_of(case, rows) for case in findings.protocol(protocol) if (rows := rows_of(findings, case))]
    return Section(protocol, HEADINGS[protocol], pictures, tables, protocol not in ("context", "rate"))


def _figures(findings: Findings, protocol: str) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Name, title and function of each plot of a protocol."""
    whole = {"shape": shape_bars, "context": context_sweep, "rate": rate_sweep}
    if protocol in whole:
        yield protocol, HEADINGS[protocol], partial(whole[protocol], findings)
    if protocol in whole or protocol == REPETITION:  # tables are enough
        return
    for case in findings.protocol(protocol):
        yield f"{case.name}-timeline", case.title, partial(timeline, findings, case)
        yield f"{case.name}-distribution", case.title, partial(cumulative, findings, case)


def as_png(make: Callable[[], Figure]) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with styled():
        make().savefig(buffer, format="png")
    return buffer.getvalue()


def table_of(case: CaseInfo, rows: list[ComparisonRow]) -> dict[str, Any]:
    """A case's numbers for the page: one row per contender, three cells per metric."""
    found = {(row.contender, row.metric.key): row for row in rows}
    keys = [key for key in METRICS_OF[case.kind] if any(row.metric.key == key for row in rows)]
    names = dict.fromkeys(row.contender for row in rows)
    return {
        "title": case.title,
        "columns": [_column(key) for key in keys],
        "lines": [
            {"name": NAMES[name], "colour": COLOURS[name], "cells": [_cell(found.get((name, key))) for key in keys]}
            for name in names
        ],
    }


def _column(key: str) -> str:
    metric = METRICS[key]
    return metric.title if metric.unit == "tok/s" else f"{metric.title}, {metric.unit}"


def _cell(row: ComparisonRow | None) -> dict[str, Any]:
    if row is None:
        return {"value": "-", "range": "", "ratio": "", "is_best": False}
    text, value = row.metric.text, row.value
    ratio = "" if row.ratio is None else f"{row.ratio.median:.2f}x"
    spread = f"{text(value.low)} … {text(value.high)}" if value.low < value.high else ""
    return {"value": text(value.median), "range": spread, "ratio": ratio, "is_best": row.is_best}


def render(findings: Findings, sections: list[Section]) -> str:
    """The page."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        about=findings.about,
        headline=headline(findings),
        remarks=remarks(findings),
        sections=sections,
        names=[{"name": NAMES[name], "colour": COLOURS[name]} for name in findings.contenders],
    )


@dataclass(frozen=True)
class Card:
    """One number: a shift policy against the best static mode."""

    title: str
    contender: str
    colour: str
    ratio: str
    range: str
    verdict: str
    """good, even or bad."""


def headline(findings: Findings) -> list[Card]:
    """Shift against the better of TP and SP: first for the shape, then for bursty workloads."""
    cases = [*findings.protocol("shape"), *findings.protocol("bursty"), *findings.protocol("trace")]
    chosen = [
        (case, key)
        for case in cases
        for key in (("ttft_ms", "e2el_ms") if case.kind == TIMED else METRICS_OF[case.kind])
    ]
    shifting = ("shift", "adaptive")
    return [
        _card(case, row, row.ratio)
        for case, key in chosen
        for row in rows_of(findings, case)
        if row.metric.key == key and row.contender in shifting and row.ratio is not None
    ]


def _card(case: CaseInfo, row: ComparisonRow, ratio: Spread) -> Card:
    verdict = _verdict(row, ratio)
    places = {"shape": "single request" if case.kind == LONE else "saturated", "bursty": "bursts"}
    where = places.get(case.protocol, case.name)
    spread = f"{ratio.low:.2f} … {ratio.high:.2f}" if ratio.low < ratio.high else ""
    title = f"{row.metric.title}, {where}"
    return Card(title, NAMES[row.contender], COLOURS[row.contender], f"{ratio.median:.2f}x", spread, verdict)


def _verdict(row: ComparisonRow, ratio: Spread) -> str:
    """Good or bad only if all repeats agree and the ratio is not close to 1."""
    if abs(ratio.median - 1) <= EVEN or ratio.low < 1 < ratio.high:
        return "even"
    return "good" if (ratio.median > 1) == row.metric.higher_is_better else "bad"
