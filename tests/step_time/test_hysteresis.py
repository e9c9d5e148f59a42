"""When a change of mode is worth it, and where modes cross over."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.step_time.costs import MODES, SP, TP, machine, measured, model_of
from ulysses_infer.step_time.crossover import fastest_by_tokens
from ulysses_infer.step_time.hysteresis import SwitchHysteresis
from ulysses_infer.step_time.step_shape import StepShape


def test_a_free_change_is_always_made():
    switching = SwitchHysteresis(0.0)
    for times in ({SP: 1.0, TP: 2.0}, {SP: 2.0, TP: 1.999}, {SP: 1.0, TP: 1.001}):
        assert switching.choose(times) == min(times, key=times.get)


def test_a_small_gain_changes_the_mode_once_it_has_added_up_to_the_cost():
    switching = SwitchHysteresis(1.0)
    assert switching.choose({SP: 1.0, TP: 2.0}) == SP
    assert [switching.choose({SP: 1.3, TP: 1.0}) for _ in range(4)] == [SP, SP, SP, TP]


def test_a_large_gain_changes_it_at_once():
    switching = SwitchHysteresis(1.0)
    switching.choose({SP: 1.0, TP: 2.0})
    assert switching.choose({SP: 9.0, TP: 1.0}) == TP


def test_modes_that_alternate_in_being_slightly_faster_change_nothing():
    switching = SwitchHysteresis(1.0)
    chosen = [switching.choose({SP: 1.0, TP: 1.0 + (-1) ** step * 0.1}) for step in range(50)]
    assert set(chosen) == {SP}


@given(st.integers(0, 2**32 - 1), st.floats(0, 5))
def test_never_much_worse_than_the_best_plan_in_hindsight(seed, cost):
    draw = random.Random(seed)
    steps = [{mode: draw.uniform(0, 2) for mode in MODES} for _ in range(60)]
    switching, total, current = SwitchHysteresis(cost), 0.0, None
    plans = dict.fromkeys(MODES, 0.0)
    for times in steps:
        mode = switching.choose(times)
        total += times[mode] + (cost if current not in (None, mode) else 0.0)
        current = mode
        cheapest = min(plans.values()) + cost
        plans = {m: min(plans[m], cheapest) + times[m] for m in MODES}
    assert total <= 3 * min(plans.values()) + 3 * (cost + 2)


@pytest.mark.parametrize("most", [1, 2, 500, 4096])
def test_crossovers_are_where_the_machine_has_them(most):
    model = model_of(measured(machine))
    stretches = fastest_by_tokens(model, lambda tokens: StepShape.of([], [(0, tokens)]), most)
    assert stretches[0] == (1, TP)
    truth = next(t for t in range(1, 4097) if machine(SP, shape := StepShape.of([], [(0, t)])) < machine(TP, shape))
    if most < truth / 1.5:
        assert len(stretches) == 1
    if most > 1.5 * truth:
        assert [stretch.mode for stretch in stretches] == [TP, SP]
        assert truth / 1.5 < stretches[1].tokens < 1.5 * truth
