"""The parts of a check of plan fit in its time on machines of any speed, with enough requests for its figures."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.check_sizes import (
    CALIBRATION_SHARE,
    LEAST_BATCHED,
    PROBES_SHARE,
    RUN_SHARE,
    SPEED_SHARE,
    CheckSizes,
    Speed,
    context_of,
)
from benchmarks.judge_plan_here import RUNS, slice_of
from ulysses_infer.bench.compare.protocols import TIMED, ComparisonCase
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import Measurement
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.step_time.step_shape import StepShape

TRACE = [TraceRow(0.2 * number, 100 + 37 * (number % 110), 1 + number % 60, (number,)) for number in range(4000)]
SLOW, FAST = Speed(110.0, 0.1), Speed(4000.0, 0.004)


def made(speed: Speed, minutes: float = 12.0) -> CheckSizes:
    return CheckSizes.of(speed, minutes, 1024)


def probe_seconds(sizes: CheckSizes, speed: Speed) -> float:
    """Of one mode."""
    prompt = sizes.input_len / speed.tokens_per_second
    saturated = sizes.num_saturated * (sizes.input_len + sizes.output_len) / speed.tokens_per_second
    return saturated + sizes.num_lone * (prompt + sizes.output_len * speed.decode_seconds)


@given(st.floats(60, 1e5), st.floats(0.5, 3.0), st.floats(8, 60))
def test_all_parts_fit_in_the_time(tokens_per_second, slowness, minutes):
    speed = Speed(tokens_per_second, slowness / min(40, tokens_per_second))
    sizes = made(speed, minutes)
    parts = sizes.calibration_seconds + 2 * probe_seconds(sizes, speed) + len(RUNS) * sizes.run_seconds
    assert parts < 60 * minutes
    assert SPEED_SHARE + CALIBRATION_SHARE + PROBES_SHARE + len(RUNS) * RUN_SHARE < 0.85


@pytest.mark.parametrize(("speed", "least"), [(SLOW, 90), (FAST, 100)])
def test_a_slow_machine_gets_shorter_requests_not_fewer(speed, least):
    sizes = made(speed)
    rows, block_tokens = sizes.scaled(TRACE, 8192)
    source = ComparisonCase("trace", "trace", "", TIMED, tuple(rows), block_tokens=block_tokens)
    case = slice_of(source, speed.tokens_per_second, sizes.run_seconds)
    tokens = sum(row.input_len + row.output_len for row in case.rows)
    assert len(case.rows) >= least
    assert tokens == pytest.approx(0.5 * speed.tokens_per_second * sizes.run_seconds, rel=0.1)
    assert case.rows[-1].at == pytest.approx(sizes.run_seconds)
    assert fmean(row.output_len for row in case.rows) == pytest.approx(sizes.output_len, rel=0.25)
    assert fmean(row.input_len for row in case.rows) == pytest.approx(sizes.input_len, rel=0.25)


def test_steps_take_about_a_second_at_most():
    assert made(SLOW).max_num_batched_tokens == LEAST_BATCHED
    assert made(Speed(300.0, 0.1)).max_num_batched_tokens == 256
    assert made(FAST).max_num_batched_tokens == 1024


def test_requests_fit_in_the_context_and_share_what_they_shared():
    rows, block_tokens = made(SLOW).scaled(TRACE, 256)
    assert max(row.input_len + row.output_len for row in rows) <= 256
    assert [row.hash_ids[:1] for row in rows] == [row.hash_ids for row in TRACE]
    assert all(len(row.hash_ids) <= -(-row.input_len // block_tokens) for row in rows)
    assert context_of(rows) == 512
    assert context_of([TraceRow(0.0, 500, 100)]) == 1024


def test_the_speed_is_that_of_the_faster_mode():
    def step(mode: Mode, tokens: int, seconds: float) -> Measurement:
        return Measurement(mode, StepShape.of([], [(0, tokens)]), seconds)

    found = Speed.of(Profile({}, [step(Mode(1, 2), 2, 0.1), step(Mode(1, 2), 64, 0.8), step(Mode(2, 1), 64, 0.5)]))
    assert found == Speed(128.0, 0.1)
