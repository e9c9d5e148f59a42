"""Findings of a comparison, made from numbers that the test knows."""

from __future__ import annotations

from ulysses_infer.bench.compare.findings import CaseInfo, ContenderRun, Findings, RequestRow, StepRow
from ulysses_infer.bench.compare.measuring import metrics_of
from ulysses_infer.bench.compare.protocols import Capacity, ComparisonCase, ProtocolInputs, WorkloadSizes

SIZES = WorkloadSizes(input_len=100, output_len=10, num_lone=2, num_saturated=8, contexts=(50, 100, 4000), seconds=10.0)
INPUTS = ProtocolInputs(SIZES, Capacity(requests=4.0, tokens=440.0), max_model_len=8192)
SPEEDS = {"dp": 2.0, "tp": 1.0, "sp": 1.5, "shift": 1.1, "adaptive": 0.9}
"""Time relative to tp."""
ABOUT = {
    "model": "demo <b>",
    "num_ranks": 2,
    "repeats": 2,
    "threshold_tokens": 64,
    "date": "2026-11-21 12:00",
    "machine": "2 cores",
    "version": "0.1.0",
    "notes": {"link": "1gbit"},
    "command": "ulysses-infer bench compare",
}


def findings_of(cases: list[ComparisonCase], repeats: int = 2, foreign: float = 0.0) -> Findings:
    found = Findings(dict(ABOUT), contenders=list(SPEEDS))
    found.cases = [CaseInfo(case.protocol, case.name, case.title, case.kind, case.x, len(case.rows)) for case in cases]
    for repeat in range(repeats):
        for case in cases:
            found.runs += [run_of(case, name, repeat, factor, foreign) for name, factor in SPEEDS.items()]
    return found


def run_of(case: ComparisonCase, name: str, repeat: int, factor: float, foreign: float = 0.0) -> ContenderRun:
    """Each request takes 0.1 s to its first token and 0.01 s per token, times the factor; later repeats 10 % more."""
    factor *= 1 + repeat / 10
    requests = [
        RequestRow(row.at, 0.1 * factor, 0.01 * factor, 0.2 * factor, row.input_len, row.output_len, 0, "")
        for row in case.rows
    ]
    modes = [(2, 1), (1, 2)] if name in ("shift", "adaptive") else [(2, 1) if name == "sp" else (1, 2)]
    steps = [StepRow(i * 0.05, 0.04, *modes[i % len(modes)], 8, 8) for i in range(20)]
    gaps = [0.01 * factor] * 9 * len(requests)
    return ContenderRun(name, case.name, repeat, metrics_of(requests), requests, steps, gaps, 2.0, foreign)
