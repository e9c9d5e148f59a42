"""Calibration on real ranks: it leaves nothing behind, and the policy that uses it changes no output."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from pathlib import Path

import pytest

from tests.caches import empty_cache
from tests.tiny import encode, settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.cli import calibrate as command
from ulysses_infer.cli.arguments import parse
from ulysses_infer.engine.calibration import Rounds, typical_seconds
from ulysses_infer.engine.calibration_points import FINE_TOKENS, TOKENS, VERIFIED_ROWS, Limits, Point, design
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.profile import Profile, cached_path

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["hello", "the quick brown fox jumps", "a", "what is it"]
SHORT = {"policy.calibration_seconds": 0.5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", empty_cache(tmp_path))


def adaptive(sp=1, **changes):
    return settings(sp, **{"policy.name": "adaptive", **SHORT, **changes})


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def assert_untouched(engine):
    stats = engine.stats()
    assert stats["modes"] == {}
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"], stats["switches"]) == (0, 0, 0)
    assert stats["policy_stats"].get("steps", 0) == 0
    if engine.is_first:
        inner = engine._engine
        inner.scheduler.allocator.assert_idle()
        assert len(inner.worker.tables) == len(inner.requests._forgotten), "only dropped with the next plan"
        assert inner.worker.groups.clock.take() == {}


# -- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fine", [TOKENS, FINE_TOKENS])
@pytest.mark.parametrize("limits", [Limits(8192, 256, 8191, 32768), Limits(32, 8, 127, 256), Limits(1, 1, 1, 4)])
def test_the_design_stays_within_the_limits_and_has_each_point_once(limits, fine):
    points = design(limits, fine)
    assert points
    assert len({point.shape for point in points}) == len(points)
    for point in points:
        ends = [start + count for start, count in point.sequences]
        assert 1 <= point.shape.num_tokens <= limits.num_tokens
        assert len(ends) <= limits.num_sequences
        assert max(ends) <= limits.context
        assert sum(ends) <= limits.cached


@pytest.mark.parametrize(("context", "cached"), [(8191, 32768), (8191, 1024), (127, 32768)])
def test_all_sizes_of_verified_steps_are_measured_however_little_is_cached(context, cached):
    points = design(Limits(512, 16, context, cached))
    assert {*VERIFIED_ROWS} <= {point.decodes for point in points if not point.chunks}


def test_a_point_prints_its_shape():
    point = Point(2, 100, ((50, 8),))
    assert point.sequences == [(99, 1), (99, 1), (50, 8)]
    assert (point.shape.decode_context, point.shape.num_prefill_tokens, point.shape.past_pairs) == (200, 8, 400)


def test_a_slow_visit_slows_all_modes_and_does_not_change_how_they_compare():
    assert typical_seconds([[1.0, 5.0, 1.1], [2.0, 10.0, 2.2]]) == pytest.approx([1.1, 2.2])
    assert typical_seconds([[3.0], [1.0]]) == pytest.approx([3.0, 1.0])
    assert typical_seconds([[1.0, 2.0, 9.0]]) == pytest.approx([2.0])
    assert typical_seconds([[1.0, 2.0, 9.0], [4.0]]) == [2.0, 4.0]


class InstantSteps:
    """In place of a calibration: every step takes a microsecond."""

    def time_point(self, point, mode):
        return [1e-6]


def test_what_the_time_did_not_suffice_for_is_known():
    modes, points = [Mode(2, 1), Mode(1, 2)], design(Limits(64, 8, 128, 512))
    measured, stopped = (Rounds(InstantSteps(), modes, {}) for _ in range(2))
    measured.measure(points, time.perf_counter() + 60, 1)
    stopped.measure(points, time.perf_counter(), 1)
    assert measured.unmeasured(points) == []
    assert stopped.unmeasured(points) == points
    assert command.incomplete(3, 40, 2048) == (
        "  the time was up before 3 of 40 kinds of steps were measured, the longest of 2048 tokens, whose times are "
        "extrapolated: give --seconds a larger value"
    )


# -- one rank --------------------------------------------------------------------------------------------------------


def test_calibrating_leaves_an_idle_engine_as_it_was(folder):
    with init_inference(folder, **settings()) as engine:
        profile = engine.calibrate(1.0)
        assert_untouched(engine)
        assert all(seconds > 0 for _, _, seconds in profile.measurements)
        assert tokens(engine.generate(PROMPTS, GREEDY)) == tokens(engine.generate(PROMPTS, GREEDY))
        engine.calibrate(0.2)
        engine._engine.scheduler.allocator.assert_idle()


def test_it_is_refused_while_requests_run(folder):
    with init_inference(folder, **settings()) as engine:
        stream = engine.stream("hello", GREEDY)
        next(stream)
        with pytest.raises(RequestError, match="requests are running"):
            engine.calibrate(1.0)
        assert len(tokens([*stream][-1:])[0]) == 12


def test_a_cache_of_one_block_is_enough(folder):
    small = {"cache.num_blocks": 1, "cache.block_size": 16, "scheduler.max_num_seqs": 1}
    with init_inference(folder, **settings(**small)) as engine:
        assert engine.calibrate(0.5).measurements
        assert_untouched(engine)


# -- two ranks -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def logged(level):
    """What the package logs on this rank."""
    text, logger = io.StringIO(), logging.getLogger("ulysses_infer")
    handler, usual = logging.StreamHandler(text), logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield text
    finally:
        logger.removeHandler(handler)
        logger.setLevel(usual)


def decide_and_explain(folder, cache):
    """On every rank: what was generated, and the last explanation."""
    os.environ["XDG_CACHE_HOME"] = cache
    more = {"runtime.log_level": "debug"}
    with logged(logging.DEBUG) as log, init_inference(folder, **adaptive(2, **more)) as engine:
        assert_untouched(engine)
        assert engine.stats()["policy"]["profile"].startswith("measured in")
        found = tokens(engine.generate(PROMPTS, GREEDY))
        stats = engine.stats()["policy_stats"]
        if engine.is_first:
            assert 0 < stats["steps"] <= len(engine.recent_steps)  # those that are recorded are not learned from
        assert stats["regret_seconds"] >= 0
        for step in (None, 0, 3):
            line = engine.explain(step)
            assert "predicted sp2xtp1" in line
            assert "sp1xtp2" in line
            assert "took" in line
        assert engine.explain(0).startswith("step 0, ")
        explained = engine.explain(0)
        assert explained in log.getvalue() or not engine.is_first
        with pytest.raises(RequestError, match="step 999 is not known; the records are of steps 0 to"):
            engine.explain(999)
        for name, mode in (("static", "sp"), ("static", "tp")):
            engine.set_policy(name, mode=mode)
            assert tokens(engine.generate(PROMPTS, GREEDY)) == found
            assert "the mode of policy static" in engine.explain()
        return found, engine.explain(), engine.stats()["policy"]


@pytest.mark.distributed
def test_adaptive_measures_decides_explains_and_changes_no_output(folder, tmp_path, rank_pool):
    first, second = rank_pool(2).run(decide_and_explain, folder, str(tmp_path))
    assert first == second


def store_and_find(folder, cache):
    """On every rank; only the first one reads and writes files."""
    os.environ["XDG_CACHE_HOME"] = cache
    with init_inference(folder, **adaptive(2)) as engine:
        profile = engine.calibrate(0.5)
    is_first, stored, named = engine.is_first, cached_path(profile.key), Path(cache) / "named.json"
    if is_first:
        first = stored.read_text()
        profile.save(named)
    with logged(logging.INFO) as log, init_inference(folder, **settings(2)) as engine:
        engine.set_policy("adaptive")
        assert engine.stats()["policy"]["profile"] == "read from the cache"
        engine.set_policy("adaptive", profile=str(named))
        assert engine.stats()["policy"]["profile"] == f"read from {named}"
        foreign = Profile(dict(profile.key) | {"threads": 64}, profile.measurements)
        if is_first:
            foreign.save(named)
        with pytest.raises(ConfigError, match="threads is 64 there and 1 here; calibrate again"):
            engine.set_policy("adaptive", profile=str(named))
        assert engine.stats()["policy"]["profile"] != "nothing"
        if is_first:
            assert stored.read_text() == first, "it was not measured again"
            foreign.save(stored)
        engine.set_policy("adaptive", calibration_seconds=0.5)
        if is_first:
            assert "threads is 64 there and 1 here; measuring them, for at most 0.5 s" in log.getvalue()
            assert Profile.load(stored).key == profile.key
        return len(tokens(engine.generate(PROMPTS, GREEDY)))


@pytest.mark.distributed
def test_what_was_measured_is_stored_found_again_and_refused_elsewhere(folder, tmp_path, rank_pool):
    assert rank_pool(2).run(store_and_find, folder, str(tmp_path)) == [4, 4]


@pytest.mark.distributed
@pytest.mark.thorough
def test_without_calibration_it_learns_from_traffic(folder):
    with init_inference(folder, **adaptive(2, **{"policy.calibration_seconds": 0})) as engine:
        assert engine.stats()["policy"]["profile"] == "the sizes of the model, until steps are measured"
        found = tokens(engine.generate(PROMPTS, GREEDY))
        assert {step.mode for step in engine.recent_steps} == {(2, 1), (1, 2)}, "it tried both"
        engine.set_policy("static", mode="tp")
        assert tokens(engine.generate(PROMPTS, GREEDY)) == found


@pytest.mark.thorough
@pytest.mark.distributed
def test_set_while_requests_run_it_does_not_stop_them_to_measure(folder):
    with init_inference(folder, **settings(2)) as engine:
        stream = engine.stream("hello", GREEDY)
        next(stream)
        engine.set_policy("adaptive")
        assert engine.stats()["policy"]["profile"] == "the sizes of the model, until steps are measured"
        (*_, last) = stream
        assert len(last.outputs[0].token_ids) == 12


def on_every_rank(folder, cache):
    os.environ["XDG_CACHE_HOME"] = cache
    with init_inference(folder, **adaptive(2)) as engine:
        outputs = tokens(engine.generate(PROMPTS, GREEDY))
        explained, stats = engine.explain(), engine.stats()
        profile = engine.calibrate(0.3)
        return outputs, explained, stats["policy"], len(profile.measurements), tokens(engine.generate("a", GREEDY))


@pytest.mark.distributed
def test_under_a_launcher_every_rank_gets_the_same(folder, rank_pool, tmp_path):
    first, second = rank_pool(2).run(on_every_rank, folder, str(tmp_path))
    assert first == second


@pytest.mark.distributed
@pytest.mark.thorough
def test_chunks_of_a_long_prompt_are_made_small_for_a_target(folder):
    with init_inference(folder, **adaptive(2, **{"policy.target_tpot_ms": 0.001})) as engine:
        engine.generate(["a", encode("b" * 100)], GREEDY, arrival_steps=[0, 3])
        mixed = [step for step in engine.recent_steps if step.num_decodes and step.num_tokens > step.num_decodes]
        assert len(mixed) == 7, "100 tokens in chunks of 16"
        assert all(step.num_tokens - step.num_decodes <= 16 for step in mixed)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.distributed
def test_the_command_prints_a_table_and_writes_a_profile(folder, tmp_path, capfd):
    path = tmp_path / "profile.json"
    words = [f"{key}={value}" for key, value in settings(2).items()]
    parsed = parse(["calibrate", folder, "--seconds", "1", "--output", str(path), *words])
    command.run(parsed.options, parsed.config(), rank=0)
    printed = capfd.readouterr().out
    assert "1 x 16 prompt tokens" in printed or "1 x 8 prompt tokens" in printed
    for name in ("SP 2 ms", "TP 2 ms", "fastest", "decodes at 256", "prompt after 0", f"policy.profile={path}"):
        assert name in printed
    assert Profile.load(path).measurements


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "inf", "nan"])
def test_the_command_requires_a_time(seconds):
    with pytest.raises(ConfigError, match="is not a number of seconds above 0"):
        parse(["calibrate", "model", "--seconds", seconds])


def test_the_command_checks_the_output_path_before_it_measures(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; create it"):
        command.check_output(str(tmp_path / "missing" / "profile.json"))
