"""The history of the last minutes: sums are complete, memory is bounded, nothing is sent twice."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.observe.traffic import SP, TP, ReplayClock, Traffic, make_ready, make_state, make_step
from ulysses_infer.config import Config
from ulysses_infer.server.client import RequestRecord
from ulysses_infer.server.messages import SpeculationCounts
from ulysses_infer.server.observe import Observatory
from ulysses_infer.server.observe.history import BAND_SECONDS, RECENT_STEPS, SPAN_SECONDS, History
from ulysses_infer.server.observe.snapshot import MOST_SEGMENTS, snapshot
from ulysses_infer.server.observe.windows import Samples

START = 1000.0
steps_strategy = st.lists(
    st.tuples(st.floats(0.0, 3.0), st.floats(1e-4, 2.0), st.sampled_from([SP, TP, (2, 2)]), st.integers(1, 4096)),
    max_size=60,
)


def play(steps: list[tuple[float, float, tuple[int, int], int]]) -> History:
    """Steps as (pause before it, seconds, mode, tokens)."""
    clock = ReplayClock(START)
    history = History(clock)
    for sequence, (pause, seconds, mode, num_tokens) in enumerate(steps):
        started = clock() + pause
        clock.now = started + seconds
        history.on_step(make_step(sequence, started, seconds=seconds, mode=mode, num_tokens=num_tokens, num_decodes=1))
    return history


@given(steps_strategy)
def test_the_band_holds_every_step_and_its_whole_time(steps: list) -> None:
    history = play(steps)
    seen = snapshot(history, SPAN_SECONDS)
    rows = seen["band"]["rows"]
    assert sum(row[1] for row in rows) == len(steps)
    assert sum(row[2] for row in rows) == sum(step[3] for step in steps)
    for mode, number in history.modes.items():
        drawn = sum(row[4 + number] for row in rows if len(row) > 4 + number)
        assert drawn == pytest.approx(sum(step[1] for step in steps if step[2] == mode), abs=1e-4 * (1 + len(rows)))
    assert all(sum(row[4:]) <= seen["band"]["width"] + 1e-3 for row in rows)
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})


@given(steps_strategy)
def test_switches_are_changes_between_neighbouring_steps(steps: list) -> None:
    modes = [step[2] for step in steps]
    assert snapshot(play(steps), 900)["totals"]["switches"] == sum(a != b for a, b in itertools.pairwise(modes))


@given(steps_strategy, st.integers(0, 60), st.sampled_from([60.0, 120.0, 900.0]))
def test_updates_added_to_earlier_data_give_the_whole_history(steps: list, first: int, seconds: float) -> None:
    clock = ReplayClock(START)
    history = History(clock)
    have: dict[str, dict] = {"band": {}, "points": {}, "steps": {}}
    since = None
    for sequence, (pause, took, mode, num_tokens) in enumerate(steps):
        started = clock() + pause
        clock.now = started + took
        history.on_step(make_step(sequence, started, seconds=took, mode=mode, num_tokens=num_tokens))
        if sequence % 7 == first % 7:
            since = collect(have, snapshot(history, seconds, since))
    collect(have, snapshot(history, seconds, since))
    whole = snapshot(history, seconds)
    for name in ("band", "points"):
        assert [have[name][row[0]] for row in whole[name]["rows"]] == whole[name]["rows"]
    assert [have["steps"][step[0]] for step in whole["steps"]] == whole["steps"]


def test_drafts_are_counted_per_decode_and_position() -> None:
    clock = ReplayClock(START)
    history = History(clock)
    counts = [
        SpeculationCounts(0, 0, 0, [0, 0]),
        SpeculationCounts(2, 6, 3, [2, 1]),
        SpeculationCounts(3, 8, 4, [3, 1]),
    ]
    for sequence, count in enumerate(counts):
        history.on_state(make_state(speculation=count))
        if sequence:
            history.on_step(make_step(sequence, clock(), num_tokens=20, num_decodes=2 + count.num_draft_tokens // 2))
        clock.now += 1.0
    seen = snapshot(history, 60)
    assert seen["state"]["speculates"]
    assert seen["window"]["drafts"] == {"count": 3, "tokens": 8, "accepted": 4, "per_position": [1.0, 0.3333]}
    columns = seen["points"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in seen["points"]["rows"]]
    assert [(row["drafted"], row["step_output"]) for row in rows[1:]] == [(None, None), (0.5, 1.25)]
    assert not snapshot(History(clock), 60)["window"]["drafts"]["per_position"]


def collect(have: dict[str, dict], seen: dict) -> float:
    for name in ("band", "points"):
        have[name].update({row[0]: row for row in seen[name]["rows"]})
    have["steps"].update({step[0]: step for step in seen["steps"]})
    return seen["now"]


@given(st.lists(st.floats(1e-5, 1e4), min_size=1), st.sampled_from([0.5, 0.9, 0.99]))
def test_percentiles_are_within_a_twentieth(values: list[float], share: float) -> None:
    samples = Samples()
    for value in values:
        samples.add(value)
    exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    assert samples.percentiles([share])[0] == pytest.approx(exact, rel=0.05)


@given(st.lists(st.floats(0, 1e5)), st.lists(st.floats(0, 1e5)))
def test_merged_samples_are_those_of_both(first: list[float], second: list[float]) -> None:
    parts = [Samples(), Samples(), Samples()]
    for part, values in zip(parts, (first, second, first + second), strict=True):
        for value in values:
            part.add(value)
    shares = (0.0, 0.25, 0.5, 1.0)
    assert Samples().merge(parts[:2]).percentiles(shares) == parts[2].percentiles(shares)


def test_no_samples_have_no_percentiles() -> None:
    assert Samples().percentiles([0.5, 0.99]) == [None, None]


def test_memory_has_a_bound_however_long_it_runs() -> None:
    clock = ReplayClock(START)
    history = History(clock)
    for sequence in range(4000):
        clock.now = START + sequence  # more than an hour
        history.on_step(make_step(sequence, clock.now - 0.5, seconds=0.5))
        history.on_tokens(0.02, 1)
    assert len(history.recent) == RECENT_STEPS
    assert len(history.seconds) <= SPAN_SECONDS + 1
    assert len(history.band) <= SPAN_SECONDS / BAND_SECONDS + 1
    assert history.totals.num_generated_tokens == 4000


def test_a_step_from_before_or_after_all_time_does_no_harm() -> None:
    clock = ReplayClock(START)
    history = History(clock)
    history.on_step(make_step(0, -1e9, seconds=2e9))
    history.on_step(make_step(1, 1e9, seconds=1.0))
    history.on_step(make_step(2, START, seconds=0.0))
    assert len(history.band) <= SPAN_SECONDS / BAND_SECONDS + 1
    assert sum(row[1] for row in snapshot(history, 900)["band"]["rows"]) == 3


@pytest.mark.parametrize("seconds", [-5.0, 0.0, 30.0, 120.0, 900.0, 1e9, math.inf, math.nan])
def test_any_window_gives_a_bounded_answer_in_plain_json(seconds: float) -> None:
    clock = ReplayClock(START)
    observatory = Observatory(Config(), clock)
    observatory.on_ready(make_ready())
    Traffic(observatory, clock).run(START + 200, lambda now: setattr(clock, "now", now))
    seen = observatory.snapshot(seconds)
    assert 10 <= seen["seconds"] <= SPAN_SECONDS
    assert len(seen["band"]["rows"]) <= MOST_SEGMENTS + 1
    assert len(seen["points"]["rows"]) <= 182
    assert json.loads(json.dumps(seen, allow_nan=False)) == seen


def test_rows_hold_the_events_of_their_second() -> None:
    clock = ReplayClock(START + 0.5)
    history = History(clock)
    history.on_state(make_state(num_running=2, prefix_cache_queries=50, prefix_cache_hits=10))
    history.on_step(make_step(0, START + 0.2, seconds=0.25, num_tokens=108, num_decodes=8))
    history.on_first_token(RequestRecord("r", START - 1.5, 100, 1, first_token_time=START + 0.5), 1)
    history.on_tokens(0.02, 1)
    clock.now = START + 1.5
    seen = snapshot(history, 60)
    row = dict(zip(seen["points"]["columns"], seen["points"]["rows"][0], strict=True))
    assert row["index"] == START
    assert row["prompt"] == 100
    assert row["generated"] == 2
    assert row["running"] == 2
    assert (row["cache_queries"], row["cache_hits"]) == (50, 10)
    assert row["first_token_p50"] == pytest.approx(2.0, rel=0.05)
    assert row["inter_token_p99"] == pytest.approx(0.02, rel=0.05)
    assert seen["speed"] == {"prompt": 20.0, "generated": 0.4}
    assert seen["window"]["prefix_hit_rate"] == 0.2


def test_outcomes_leave_the_window_and_stay_in_the_totals() -> None:
    clock = ReplayClock(START)
    history = History(clock)
    history.on_finish(RequestRecord("r", START - 1, 1, 1, finish_time=START, finish_reason="stop"), 0)
    assert snapshot(history, 60)["window"]["finished"] == {"stop": 1}
    clock.now = START + 100
    seen = snapshot(history, 60)
    assert seen["window"]["finished"] == {}
    assert seen["totals"]["finished"] == {"stop": 1}


def test_modes_have_the_colours_of_the_terminal() -> None:
    observatory = Observatory(Config())
    observatory.on_ready(make_ready([(4, 2), (8, 1), (1, 8), (1, 1)]))
    modes = observatory.snapshot(60)["modes"]
    assert [(mode["name"], mode["kind"]) for mode in modes] == [
        ("SP 4 x TP 2", "mixed"),
        ("SP 8", "sp"),
        ("TP 8", "tp"),
        ("1 rank", "tp"),
    ]


def test_status_goes_from_starting_to_dead() -> None:
    observatory = Observatory(Config())
    seen = [observatory.snapshot(60)["status"]]
    observatory.on_ready(make_ready())
    seen.append(observatory.snapshot(60)["status"])
    observatory.on_draining(observatory._clock() + 5)
    assert 0 < observatory.snapshot(60)["drain_seconds"] <= 5
    seen.append(observatory.snapshot(60)["status"])
    observatory.on_dead("a reason")
    observatory.on_draining(1.0)
    seen.append(observatory.snapshot(60)["status"])
    assert seen == ["starting", "ready", "draining", "dead"]
    assert observatory.snapshot(60)["reason"] == "a reason"
