"""Policy adaptive: decisions, explanations, learning and counts, on machines whose times are known."""

from __future__ import annotations

import json
import random

import pytest

from tests.step_time.costs import MODES, SP, TABLE, TP, machine, measured, table_cost
from ulysses_infer.config import PolicyConfig, load_config
from ulysses_infer.engine.batch import Batch, ScheduledRequest
from ulysses_infer.engine.policies import AdaptivePolicy, make_policy
from ulysses_infer.engine.request import Request
from ulysses_infer.errors import ConfigError
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.step_time.prior import CPU, Sizes, assumed_steps
from ulysses_infer.step_time.profile import Profile

SIZES = Sizes(16, 1536, 12, 4, 128, 500_000_000, 2)


def policy(cost=machine, switch_seconds=0.0, **settings):
    made = AdaptivePolicy(MODES, PolicyConfig(name="adaptive", **settings))
    made.learn(Profile({}, measured(cost), switch_seconds), "made up")
    return made


def prompt(tokens, start=0):
    request = Request("r", 0, [1] * (start + tokens), SamplingParams(), arrival_time=0.0)
    return Batch([], [ScheduledRequest(request, start, tokens, [], True)])


def decodes(count, context=200):
    request = Request("r", 0, [1], SamplingParams(), arrival_time=0.0)
    return Batch([ScheduledRequest(request, context - 1, 1, [], True)] * count, [])


def some_batch(draw):
    return draw.choice([prompt(draw.randrange(1, 2000)), decodes(draw.randrange(1, 60), draw.randrange(2, 3000))])


def run(chosen, batch, cost=machine, noise=1.0):
    decision = chosen.decide(batch)
    seconds = cost(decision.mode, batch.shape) * noise
    chosen.observe(batch, decision, seconds)
    return decision, seconds


@pytest.mark.parametrize("link", TABLE)
def test_it_takes_the_lower_of_each_measured_row(link):
    chosen = policy(table_cost(link))
    for tokens, (tp, sp) in TABLE[link].items():
        taken = {TP: tp, SP: sp}[chosen.choose(prompt(tokens))]
        assert taken <= 1.05 * min(tp, sp)


def test_it_is_made_from_a_recipe_and_knows_nothing_at_first():
    made = make_policy(PolicyConfig(name="adaptive"), MODES, SP, TP)
    assert isinstance(made, AdaptivePolicy)
    assert made.wants_calibration
    assert made.choose(prompt(10)) in MODES


@pytest.mark.parametrize(
    ("modes", "settings", "wants"),
    [
        (MODES, {}, True),
        (MODES, {"calibration_seconds": 0}, False),
        ([SP], {}, False),
        ([SP], {"target_tpot_ms": 9}, True),
    ],
)
def test_it_wants_calibration_only_where_it_decides_something(modes, settings, wants):
    assert AdaptivePolicy(modes, PolicyConfig(name="adaptive", **settings)).wants_calibration is wants


def test_a_decision_records_predictions_and_the_reason():
    chosen = policy()
    decision, seconds = run(chosen, decodes(3))
    assert decision.mode == TP
    assert dict(decision.predicted)[TP] < dict(decision.predicted)[SP]
    text = decision.explain(seconds)
    assert text.startswith("sp1xtp2: predicted fastest (3 decodes, 0 prefill tokens, 600 in context); predicted ")
    assert "took" in text
    assert "\n" not in text


def test_a_single_mode_is_the_recorded_reason():
    only = AdaptivePolicy([SP], PolicyConfig(name="adaptive"))
    assert only.decide(prompt(5)).reason.startswith("the only mode loaded")


def test_a_change_that_costs_more_than_it_gains_is_put_off():
    chosen = policy(switch_seconds=0.5)
    assert chosen.choose(prompt(2000)) == SP
    kept = chosen.decide(decodes(4))
    assert kept.mode == SP
    assert kept.reason.startswith("kept, for a change of mode costs more")
    assert policy(switch_seconds=0.0).choose(decodes(4)) == TP


def test_regret_is_never_negative_and_small_where_the_model_is_right():
    draw, chosen = random.Random(0), policy()
    assert chosen.stats()["regret_seconds"] == 0
    for _ in range(300):
        run(chosen, some_batch(draw), noise=draw.lognormvariate(0, 0.1))
        assert chosen.stats()["regret_seconds"] >= 0
    stats = chosen.stats()
    assert stats["steps"] == 300
    assert stats["regret_share"] < 0.02
    assert 0 < stats["median_prediction_error"] < 0.15
    json.dumps(stats)


def test_exploration_finds_a_mode_that_was_measured_wrongly():
    def lied(mode, shape):
        return machine(mode, shape) * (3 if mode == TP else 1)

    honest, blind = policy(lied, exploration=0.2), policy(lied)
    for chosen in (honest, blind):
        for _ in range(200):
            run(chosen, decodes(4))
    assert blind.choose(decodes(4)) == SP, "it never explored"
    assert honest.model.predict(decodes(4).shape)[1] < honest.model.predict(decodes(4).shape)[0]
    assert honest.stats()["explored_steps"] > 0
    assert honest.stats()["explored_faster"] > 0
    assert honest.stats()["regret_seconds"] > 0, "in hindsight the other mode was the better one"


def test_without_exploration_no_step_tries_another_mode():
    draw, chosen = random.Random(1), policy()
    for _ in range(200):
        decision, _ = run(chosen, some_batch(draw))
        assert dict(decision.predicted)[decision.mode] == min(dict(decision.predicted).values())
    assert chosen.stats()["explored_steps"] == 0


def test_exploration_is_about_as_frequent_as_asked_for():
    chosen = policy(exploration=0.1)
    explored = sum(chosen.decide(decodes(4)).reason.startswith("explored") for _ in range(2000))
    assert 140 < explored < 260


def test_without_a_profile_it_tries_the_modes_and_then_knows():
    chosen = AdaptivePolicy(MODES, PolicyConfig(name="adaptive"))
    chosen.assume(assumed_steps(SIZES, CPU, MODES))

    def cost(mode, shape):  # the opposite of what the sizes suggest
        return 0.010 if mode == SP else 0.013

    reasons = [run(chosen, decodes(4), cost)[0].reason.split(" (")[0] for _ in range(60)]
    assert "tried, not measured yet" in reasons[:3]
    assert "tried, not measured yet" not in reasons[3:]
    assert chosen.choose(decodes(4)) == SP


def test_it_describes_its_settings_and_not_what_it_has_counted():
    chosen = policy(target_tpot_ms=50.0, exploration=0.1)
    before = chosen.describe()
    assert before == {"name": "adaptive", "exploration": 0.1, "target_tpot_ms": 50.0, "profile": "made up"}
    run(chosen, decodes(4))
    assert chosen.describe() == before


def test_two_policies_that_saw_the_same_decide_the_same():
    draw = random.Random(2)
    batches = [some_batch(draw) for _ in range(100)]
    first, second = policy(exploration=0.2), policy(exploration=0.2)
    assert [run(first, batch)[0].mode for batch in batches] == [run(second, batch)[0].mode for batch in batches]


# -- settings --------------------------------------------------------------------------------------------------------


def load(*overrides):
    return load_config(None, ["model.path=m", *overrides])


@pytest.mark.parametrize(
    "override",
    ["policy.exploration=0.6", "policy.exploration=-0.1", "policy.target_tpot_ms=0", "policy.calibration_seconds=-1"],
)
def test_settings_out_of_range_are_refused(override):
    with pytest.raises(ConfigError, match=r"must be (at least|at most|more than)"):
        load("policy.name=adaptive", override)


def test_a_target_needs_chunked_prefill():
    with pytest.raises(ConfigError, match=r"target_tpot_ms.*set scheduler\.enable_chunked_prefill to true"):
        load("policy.name=adaptive", "policy.target_tpot_ms=50", "scheduler.enable_chunked_prefill=false")


@pytest.mark.parametrize(
    ("overrides", "ignored"),
    [
        (["policy.exploration=0.1"], "policy.exploration"),
        (["policy.name=static", "policy.target_tpot_ms=50"], "policy.target_tpot_ms"),
        (["policy.name=adaptive", "policy.target_ttft_ms=50"], "policy.target_ttft_ms"),
        (["policy.name=adaptive", "policy.threshold_tokens=50"], "policy.threshold_tokens"),
    ],
)
def test_settings_without_effect_are_warned_of(overrides, ignored, caplog):
    load(*overrides)
    assert f"{ignored} " in caplog.text
    assert "is ignored" in caplog.text


def test_settings_with_effect_are_not(caplog):
    load("policy.name=adaptive", "policy.target_tpot_ms=50", "policy.target_ttft_ms=500", "policy.exploration=0.1")
    assert not caplog.records
