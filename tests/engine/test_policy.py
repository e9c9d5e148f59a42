import pytest
from omegaconf import OmegaConf

from ulysses_infer.config import PolicyConfig
from ulysses_infer.engine.batch import Batch, ScheduledRequest
from ulysses_infer.engine.policies import StaticPolicy, ThresholdPolicy, make_policy
from ulysses_infer.engine.request import Request
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.sampling_params import SamplingParams

BASE, MIXED, SHIFT = Mode(4, 2), Mode(2, 4), Mode(1, 8)


def batch_of(*token_counts):
    request = Request("r", 0, [1, 2, 3], SamplingParams(), arrival_time=0.0)
    return Batch([], [ScheduledRequest(request, 0, count, [], True) for count in token_counts])


def policy(modes=(BASE, MIXED, SHIFT), **config):
    return make_policy(PolicyConfig(**config), modes, BASE, SHIFT)


@pytest.mark.parametrize(("tokens", "mode"), [(1, SHIFT), (256, SHIFT), (257, BASE), (8192, BASE)])
def test_threshold_runs_the_base_mode_above_the_threshold_only(tokens, mode):
    assert ThresholdPolicy(BASE, SHIFT, 256).choose(batch_of(tokens)) == mode


def test_threshold_counts_the_tokens_of_all_requests():
    chosen = ThresholdPolicy(BASE, SHIFT, 256)
    assert chosen.choose(batch_of(*[1] * 200, 56)) == SHIFT
    assert chosen.choose(batch_of(*[1] * 200, 57)) == BASE


def test_static_never_leaves_its_mode():
    assert {StaticPolicy(MIXED).choose(batch_of(tokens)) for tokens in (1, 256, 8192)} == {MIXED}


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (None, BASE),
        ("sp", BASE),
        ("tp", SHIFT),
        ([2, 4], MIXED),
        ((2, 4), MIXED),
        (MIXED, MIXED),
        (OmegaConf.create([2, 4]), MIXED),
    ],
)
def test_static_mode_is_written_as_sp_tp_or_a_pair(value, mode):
    assert policy(name="static", mode=value).choose(batch_of(1)) == mode


@pytest.mark.parametrize("value", ["dp", [2], [2, 4, 1], ["2", 4], [2.0, 4], 8, {"sp": 2}])
def test_a_static_mode_that_is_not_one_is_refused(value):
    with pytest.raises(ConfigError, match=r"is not a mode; use sp, tp or \[sp, tp\]"):
        policy(name="static", mode=value)


def test_a_mode_that_is_not_loaded_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"needs mode \[8, 1\].*use one of \[4, 2\], \[2, 4\], \[1, 8\]"):
        policy(name="static", mode=[8, 1])


def test_threshold_without_the_shift_mode_is_refused():
    with pytest.raises(ConfigError, match=r"policy threshold needs mode \[1, 8\], which is not loaded"):
        policy(modes=[BASE, MIXED], name="threshold")


@pytest.mark.parametrize("tokens", [-1, 2.5, "many", None, True])
def test_an_absurd_threshold_is_refused(tokens):
    with pytest.raises(ConfigError, match="threshold_tokens"):
        policy(name="threshold", threshold_tokens=tokens)


def test_a_policy_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match="'fastest' is unknown; use static, threshold, adaptive"):
        policy(name="fastest")


def test_policies_describe_themselves_in_plain_values():
    assert policy(name="static", mode="tp").describe() == {"name": "static", "mode": [1, 8]}
    assert policy(name="threshold", threshold_tokens=64).describe() == {
        "name": "threshold",
        "threshold_tokens": 64,
        "base": [4, 2],
        "shift": [1, 8],
    }
