"""Settings are compared by typical step times, which a disturbed step does not change."""

from __future__ import annotations

import pytest

from benchmarks.compare_speculation import Run, StepClock, Study, TimedStep
from ulysses_infer.bench.workload import Sample

LOAD = "edits"


def run_of(steps: list[tuple[int, float] | TimedStep], tokens: int) -> Run:
    timed = [TimedStep(*step) for step in steps]
    seconds = sum(step.seconds for step in timed)
    return Run(Sample(seconds=seconds, ttft=0.0, tpot=0.0, output_tokens=tokens, total_tokens=tokens), 0, 0, timed)


def test_a_disturbed_step_changes_no_typical_ratio():
    study = Study("model")
    study.runs[LOAD, "auto"] = [run_of([(8, 2.0), (8, 9.0)], 16), run_of([(8, 2.0), (8, 2.0)], 16)]
    study.runs[LOAD, "fixed"] = [run_of([(8, 2.0), (1, 1.0)], 9), run_of([(8, 2.0), (1, 1.0)], 9)]
    assert study.typical_ratio(LOAD, "auto", "fixed") == pytest.approx((16 / 4) / (9 / 3))
    assert study.typical_ratio(LOAD, "auto", "absent") is None


def test_recorded_steps_say_nothing_about_the_time_of_others():
    study, slow = Study("model"), TimedStep(8, 9.0, is_settled=False)
    study.runs[LOAD, "auto"] = [run_of([slow, (8, 2.0)], 8), run_of([slow], 4)]
    study.runs[LOAD, "fixed"] = [run_of([(1, 1.0)], 1)]
    assert study.typical_ratio(LOAD, "auto", "fixed") == pytest.approx((12 / 6) / 1)
    study.runs[LOAD, "auto"] = [run_of([slow], 9)]
    assert study.typical_ratio(LOAD, "auto", "fixed") == pytest.approx(1.0), "there is no better sample"


def test_steps_count_from_the_first_token_of_every_request():
    drafted = iter([0, 0, 3, 3])
    clock = StepClock(2, lambda: next(drafted))
    for touched in ([0], [0, 1], [0, 1], [1]):
        clock.tick(touched)
    assert [step.rows for step in clock.steps] == [5, 1]
    assert all(step.seconds >= 0 for step in clock.steps)
