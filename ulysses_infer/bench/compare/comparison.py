"""Statistics over the runs of a comparison: medians, spread, ratios to the best static mode per repeat."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ulysses_infer.bench.compare.findings import CaseInfo, ContenderRun, Findings
from ulysses_infer.bench.compare.protocols import LONE, SATURATED, TIMED

STATIC = ("tp", "sp")
"""The static modes; shift has to match the better of them."""
MAX_FOREIGN_CORES = 0.2
"""Busy cores of other programs above which a run counts as disturbed."""
LATE_MS = 20.0


@dataclass(frozen=True)
class Metric:
    """A compared metric."""

    key: str
    title: str
    unit: str
    higher_is_better: bool = False
    digits: int = 1

    def text(self, value: float) -> str:
        """The value as shown in tables."""
        return f"{value:,.{self.digits}f}"


METRICS = {
    metric.key: metric
    for metric in (
        Metric("ttft_ms", "TTFT", "ms"),
        Metric("ttft_p99_ms", "TTFT p99", "ms"),
        Metric("tpot_ms", "TPOT", "ms"),
        Metric("tpot_p99_ms", "TPOT p99", "ms"),
        Metric("e2el_ms", "completion", "ms", digits=0),
        Metric("e2el_p99_ms", "completion p99", "ms", digits=0),
        Metric("tokens_per_second", "tokens/s", "tok/s", higher_is_better=True, digits=0),
    )
}
METRICS_OF = {
    LONE: ("ttft_ms", "tpot_ms"),
    SATURATED: ("tokens_per_second",),
    TIMED: ("ttft_ms", "ttft_p99_ms", "tpot_ms", "tpot_p99_ms", "e2el_ms", "e2el_p99_ms", "tokens_per_second"),
}
"""The metrics of each kind of case. Latencies under saturation only show the length of the queue."""


@dataclass(frozen=True)
class Spread:
    """A median and its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


@dataclass(frozen=True)
class ComparisonRow:
    """One metric of one contender in one case."""

    case: str
    contender: str
    metric: Metric
    value: Spread
    ratio: Spread | None
    """Ratio to the best static mode in the same repeat; None if it was not measured."""
    is_best: bool
    foreign_cores: float
    """Busy cores of other programs in the most disturbed repeat."""


def rows_of(findings: Findings, case: CaseInfo) -> list[ComparisonRow]:
    """Every metric of a case, by metric and contender. Contenders without a finished request have no row."""
    return [row for key in METRICS_OF[case.kind] for row in _rows(findings, case, METRICS[key])]


def _rows(findings: Findings, case: CaseInfo, metric: Metric) -> list[ComparisonRow]:
    runs = {name: _measured(findings.of(name, case.name), metric.key) for name in findings.contenders}
    runs = {name: own for name, own in runs.items() if own}
    if not runs:
        return []
    values = {name: Spread.of(run.metrics[metric.key] for run in own) for name, own in runs.items()}
    best = _best(values, metric)
    static = {name: value for name, value in values.items() if name in STATIC}
    reference = runs[_best(static, metric)] if static else []
    return [
        ComparisonRow(
            case.name,
            name,
            metric,
            values[name],
            _ratio(own, reference, metric.key),
            name == best,
            max(run.foreign_cores for run in own),
        )
        for name, own in runs.items()
    ]


def _measured(runs: Sequence[ContenderRun], key: str) -> list[ContenderRun]:
    return [run for run in runs if key in run.metrics]


def _best(values: dict[str, Spread], metric: Metric) -> str:
    order = max if metric.higher_is_better else min
    return order(values, key=lambda name: values[name].median)


def _ratio(own: Sequence[ContenderRun], reference: Sequence[ContenderRun], key: str) -> Spread | None:
    """The ratio per repeat, because a disturbance usually affects all runs of a repeat."""
    known = {run.repeat: run.metrics[key] for run in reference}
    ratios = [run.metrics[key] / known[run.repeat] for run in own if known.get(run.repeat)]
    return Spread.of(ratios) if ratios else None


def disturbed(findings: Findings) -> list[ContenderRun]:
    """Runs during which other programs used too many cores."""
    return [run for run in findings.runs if run.foreign_cores > MAX_FOREIGN_CORES]


def remarks(findings: Findings) -> list[str]:
    """Warnings about the reliability of the numbers."""
    lines = [f"{name} did not take part: {reason}" for name, reason in findings.refused.items()]
    noisy, num_runs = disturbed(findings), len(findings.runs)
    if num_runs:
        foreign = [run.foreign_cores for run in findings.runs]
        busy = f"other programs kept {statistics.median(foreign):.2f} cores busy (median), {max(foreign):.2f} at most"
        verdict = (
            f"in {len(noisy)} of {num_runs} runs too many (> {MAX_FOREIGN_CORES:g}): small differences are not reliable"
            if noisy
            else "negligible"
        )
        lines.append(f"{busy}; {verdict}")
    failed = sum(len(run.errors) for run in findings.runs)
    if failed:
        first = next(error for run in findings.runs for error in run.errors)
        lines.append(f"{failed} requests failed and are left out; the first: {first}")
    late = max((run.late_ms for run in findings.runs), default=0.0)
    if late > LATE_MS:
        lines.append(f"the client was late by up to {late:.0f} ms: some load was lower than specified")
    return lines
