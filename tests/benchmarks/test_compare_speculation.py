"""Settings are compared by typical step times, which a disturbed step does not change."""

from __future__ import annotations

import pytest

from benchmarks.compare_speculation import Run, StepClock, Study
from ulysses_infer.bench.workload import Sample

LOAD = "edits"


def run_of(steps: list[tuple[int, float]], tokens: int) -> Run:
    sample = Sample(
        seconds=sum(seconds for _, seconds in steps), ttft=0.0, tpot=0.0, output_tokens=tokens, total_tokens=tokens
    )
    return Run(sample, 0, 0, steps)


def test_a_disturbed_step_changes_no_typical_ratio():
    study = Study("model")
    study.runs[LOAD, "auto"] = [run_of([(8, 2.0), (8, 9.0)], 16), run_of([(8, 2.0), (8, 2.0)], 16)]
    study.runs[LOAD, "fixed"] = [run_of([(8, 2.0), (1, 1.0)], 9), run_of([(8, 2.0), (1, 1.0)], 9)]
    assert study.typical_ratio(LOAD, "auto", "fixed") == pytest.approx((16 / 4) / (9 / 3))
    assert study.typical_ratio(LOAD, "auto", "absent") is None


def test_steps_count_from_the_first_token_of_every_request():
    drafted = iter([0, 0, 3, 3])
    clock = StepClock(2, lambda: next(drafted))
    for touched in ([0], [0, 1], [0, 1], [1]):
        clock.tick(touched)
    assert [rows for rows, _ in clock.steps] == [5, 1]
    assert all(seconds >= 0 for _, seconds in clock.steps)
