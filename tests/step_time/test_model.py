"""The model of step times against machines whose times are known."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.step_time.costs import LIMITS, MODES, SP, TABLE, TP, machine, measured, model_of, some_step, table_cost
from ulysses_infer.step_time.model import Measurement, StepTimeModel
from ulysses_infer.step_time.prior import CPU, Sizes, assumed_steps
from ulysses_infer.step_time.step_shape import StepShape

SIZES = Sizes(16, 1536, 12, 4, 128, 500_000_000, 2)


def fastest(model, shape):
    times = model.predict(shape)
    return model.modes[times.index(min(times))]


def best(cost, shape):
    return min(MODES, key=lambda mode: cost(mode, shape))


def errors(model, cost, draw, count=200):
    shapes = [some_step(draw) for _ in range(count)]
    return [abs(p / cost(m, s) - 1) for s in shapes for m, p in zip(MODES, model.predict(s), strict=True)]


@pytest.mark.parametrize("link", TABLE)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_lower_of_each_row_is_predicted(link, noise):
    cost = table_cost(link)
    model = model_of(measured(cost, random.Random(1), noise))
    for tokens, (tp, sp) in TABLE[link].items():
        shape = StepShape.of([], [(0, tokens)])
        taken = {TP: tp, SP: sp}[fastest(model, shape)]
        assert taken <= (1.05 if noise == 0 else 1.1) * min(tp, sp), f"{tokens} tokens: {model.predict(shape)}"


def test_steps_that_were_not_measured_are_predicted():
    draw = random.Random(2)
    found = errors(model_of(measured(machine)), machine, draw)
    assert median(found) < 0.05
    noisy = errors(model_of(measured(machine, draw, 0.1)), machine, draw)
    assert median(noisy) < 0.12


@pytest.mark.parametrize("longest", [8, 32, 128, 512])
def test_tokens_beyond_the_longest_measured_step_cost_as_much_as_below_it(longest):
    def cost(tokens):
        return 0.01 + 0.002 * tokens

    counts = [count for count in (1, 2, 4, 8, 16, 32, 128, 512) if count <= longest]
    shapes = [StepShape.of([16] * n, []) for n in counts] + [StepShape.of([], [(0, n)]) for n in counts]
    model = model_of(Measurement(mode, shape, cost(shape.num_tokens)) for mode in MODES for shape in shapes)
    for shape in (StepShape.of([16] * 4 * longest, []), StepShape.of([], [(0, 4 * longest)])):
        for seconds in model.predict(shape):
            assert seconds == pytest.approx(cost(4 * longest), rel=0.1)


def test_a_clear_difference_is_never_decided_wrongly():
    draw, model = random.Random(3), model_of(measured(machine))
    for shape in [some_step(draw) for _ in range(300)]:
        times = sorted(machine(mode, shape) for mode in MODES)
        if times[1] > 1.2 * times[0]:
            assert fastest(model, shape) == best(machine, shape), shape


def test_a_mode_with_slower_attention_is_distinguished_from_the_others():
    def cost(mode, shape):
        return machine(mode, shape) + (2e-6 * shape.decode_context if mode == TP else 0.0)

    model = model_of(measured(cost))
    assert fastest(model, StepShape.of([20] * 4, [])) == TP
    assert fastest(model, StepShape.of([6000] * 4, [])) == SP, "the context shifts the crossover"


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_predictions_are_positive_and_finite_whatever_is_observed(seed):
    draw, model = random.Random(seed), StepTimeModel(MODES)
    for _ in range(150):
        seconds = draw.choice([0.0, -1.0, math.nan, math.inf, 1e-9, draw.expovariate(10), 1e6])
        model.observe(draw.choice(MODES), some_step(draw), seconds)
        assert all(0 < time < math.inf for time in model.predict(some_step(draw)))


def test_outliers_do_not_move_a_prediction():
    model, shape = model_of(measured(machine)), StepShape.of([500] * 8, [])
    before = model.predict(shape)
    for step in range(40):
        model.observe(TP, shape, machine(TP, shape) * (30 if step % 8 == 0 else 1))
    assert model.predict(shape)[1] == pytest.approx(before[1], rel=0.1)
    assert model.drift.changes == 0


def test_observed_steps_replace_measurements_of_their_kind_only():
    model, decode, prompt = model_of(measured(machine)), StepShape.of([500] * 8, []), StepShape.of([], [(0, 2048)])
    before = model.predict(prompt)
    for _ in range(6):
        model.observe(TP, decode, 1.4 * machine(TP, decode))
    assert model.predict(decode)[1] == pytest.approx(1.4 * machine(TP, decode), rel=0.1)
    assert model.predict(prompt) == pytest.approx(before, rel=0.05)


def test_thousands_of_decodes_do_not_change_predictions_of_prompts():
    draw, model = random.Random(4), model_of(measured(machine))
    for _ in range(2000):
        shape = StepShape.of([draw.randrange(100, 1000)] * draw.randrange(1, 30), [])
        model.observe(TP, shape, machine(TP, shape) * draw.lognormvariate(0, 0.03))
    prompt = StepShape.of([], [(0, 2048)])
    assert model.predict(prompt) == pytest.approx([machine(mode, prompt) for mode in MODES], rel=0.15)
    assert model.drift.changes == 0


@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_a_change_of_speed_observed_in_one_mode_applies_to_all(factor):
    draw, model = random.Random(5), model_of(measured(machine))
    for _ in range(200):
        shape = StepShape.of([draw.randrange(100, 1000)] * draw.randrange(1, 30), [])
        model.observe(TP, shape, factor * machine(TP, shape) * draw.lognormvariate(0, 0.05))
    assert model.drift.changes == 1
    prompt = StepShape.of([], [(0, 1024)])
    assert model.predict(prompt) == pytest.approx([factor * machine(mode, prompt) for mode in MODES], rel=0.2)


def test_steps_larger_than_all_that_was_measured_are_no_change_of_speed():
    """Drafted tokens make steps of more rows than a calibration has, which may take much longer than a line says."""
    draw, model = random.Random(6), model_of(measured(machine))
    small, most = StepShape.of([500] * 8, []), LIMITS.num_sequences
    before = model.predict(small)
    for _ in range(100):
        shape = StepShape.of([500] * draw.randrange(most + 1, 3 * most), [])
        model.observe(TP, shape, 1.6 * machine(TP, shape) * draw.lognormvariate(0, 0.03))
    assert model.drift.changes == 0
    assert model.predict(small) == pytest.approx(before, rel=0.05)
    for _ in range(60):
        shape = StepShape.of([500] * draw.randrange(most + 1, 3 * most), [])
        model.observe(TP, shape, 1.7 * 1.6 * machine(TP, shape) * draw.lognormvariate(0, 0.03))
    assert model.drift.changes == 1
    assert model.predict(small) == pytest.approx([1.7 * seconds for seconds in before], rel=0.2)


def test_a_mode_that_becomes_slower_is_left():
    model, shape = model_of(measured(machine)), StepShape.of([100] * 4, [])
    assert fastest(model, shape) == TP
    for _ in range(100):
        mode = fastest(model, shape)
        model.observe(mode, shape, machine(mode, shape) * (3 if mode == TP else 1))
    assert fastest(model, shape) == SP


def test_assumed_times_give_way_to_measured_ones():
    model = StepTimeModel(MODES)
    model.learn(assumed_steps(SIZES, CPU, MODES), assumed=True)
    shape = StepShape.of([500] * 4, [])
    assert not model.is_measured(TP, shape)
    for _ in range(100):
        for mode in MODES:
            model.observe(mode, shape, machine(mode, shape))
    assert model.is_measured(TP, shape)
    assert model.predict(shape) == pytest.approx([machine(mode, shape) for mode in MODES], rel=0.05)


def test_without_measurements_small_steps_are_assumed_faster_in_tp_and_prompts_in_sp():
    model = StepTimeModel(MODES)
    model.learn(assumed_steps(SIZES, CPU, MODES), assumed=True)
    assert fastest(model, StepShape.of([100], [])) == TP
    assert fastest(model, StepShape.of([], [(0, 4096)])) == SP
