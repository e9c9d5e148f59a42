"""When requests are sent."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.bench.serve.arrivals import Ramp, Rate, arrival_times

rates = st.floats(0.01, 1000)
shapes = st.floats(0.1, 50)
seeds = st.integers(0, 1000)


@given(rates, shapes, st.integers(1, 200), seeds)
def test_arrivals_start_at_zero_never_go_back_and_repeat_with_their_seed(
    rate: float, shape: float, count: int, seed: int
) -> None:
    times = arrival_times(count, Rate(rate), shape, seed)

    assert times[0] == 0
    assert len(times) == count
    assert all(earlier <= later for earlier, later in pairwise(times))
    assert times == arrival_times(count, Rate(rate), shape, seed)


@given(rates, shapes, st.floats(1.5, 10), seeds)
def test_another_rate_is_the_same_process_on_another_clock(rate: float, shape: float, factor: float, seed: int) -> None:
    slow = arrival_times(20, Rate(rate), shape, seed)
    fast = arrival_times(20, Rate(rate * factor), shape, seed)

    assert fast == pytest.approx([moment / factor for moment in slow])


def test_infinite_rate_is_all_at_once() -> None:
    assert arrival_times(5, Rate(math.inf), 1.0, 0) == [0.0] * 5


def test_infinite_burstiness_gives_equal_gaps() -> None:
    assert arrival_times(4, Rate(2.0), math.inf, 0) == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(("shape", "variation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_gaps_have_the_mean_of_the_rate_and_the_variation_of_the_burstiness(shape: float, variation: float) -> None:
    gaps = [later - earlier for earlier, later in pairwise(arrival_times(20_000, Rate(10.0), shape, 3))]

    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.05)


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.integers(2, 500), st.booleans(), st.floats(0, 1))
def test_rate_of_a_ramp_is_correct_at_every_time(
    start: float, end: float, count: int, is_exponential: bool, share: float
) -> None:
    ramp = Ramp(start, end, count, is_exponential)
    assert ramp.moment(0) == 0
    assert ramp.moment(count) == pytest.approx(ramp.seconds)

    position = share * count * 0.99
    step = count * 1e-8  # short, also where the rate starts near zero
    gap = ramp.moment(position + step) - ramp.moment(position)
    along = ramp.moment(position + step / 2) / ramp.seconds
    wanted = start * (end / start) ** along if is_exponential else start + (end - start) * along
    assert step / gap == pytest.approx(wanted, rel=1e-2)


def test_linear_ramp_may_start_from_zero() -> None:
    times = arrival_times(101, Ramp(0.0, 10.0, 100), math.inf, 0)

    assert times[0] == 0
    assert times[25] == pytest.approx(10.0)  # half of the time brings a quarter of the requests
    assert times[100] == pytest.approx(20.0)


def test_past_its_end_a_ramp_keeps_its_last_rate() -> None:
    ramp = Ramp(1.0, 5.0, 30)

    assert ramp.moment(35) - ramp.moment(30) == pytest.approx(1.0)
