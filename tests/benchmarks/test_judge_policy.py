"""Judging a policy step by step: which steps are drawn, and what choices cost."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import judge_policy
from benchmarks.judge_policy import Judged, best_threshold, draw_points, score
from ulysses_infer.engine.calibration_points import Limits, Point
from ulysses_infer.parallel.layout import Mode

SP, TP = Mode(2, 1), Mode(1, 2)


def step(tokens, sp, tp, chosen=SP):
    return Judged(Point(0, 0, ((0, tokens),)), {SP: sp, TP: tp}, chosen)


@given(
    st.builds(
        Limits,
        num_tokens=st.integers(2, 4096),
        num_sequences=st.integers(2, 300),
        context=st.integers(16, 9000),
        cached=st.integers(9000, 40000),
    ),
    st.integers(0, 99),
)
def test_drawn_steps_stay_within_the_limits(limits, seed):
    for point in draw_points(20, limits, seed):
        ends = [start + count for start, count in point.sequences]
        assert 1 <= point.shape.num_tokens <= limits.num_tokens
        assert len(ends) <= limits.num_sequences
        assert max(ends) <= limits.context
        assert sum(ends) <= limits.cached


def test_decodes_prompts_and_mixtures_are_all_drawn():
    drawn = draw_points(100, Limits(2048, 64, 8191, 32768), 1)
    kinds = {(point.decodes > 0, bool(point.chunks)) for point in drawn}
    assert kinds == {(True, False), (False, True), (True, True)}
    assert any(start > 0 for point in drawn for start, _ in point.chunks), "some prompts go on after cached tokens"


def test_the_best_threshold_lies_where_the_modes_cross_over():
    judged = [step(1, 3.0, 1.0), step(64, 2.0, 1.0), step(65, 1.0, 2.0), step(900, 1.0, 3.0)]
    assert best_threshold(judged, SP, TP) == (64, [TP, TP, SP, SP])


def test_a_mode_that_is_always_faster_gives_a_threshold_that_never_changes():
    judged = [step(1, 1.0, 2.0), step(64, 1.0, 2.0)]
    threshold, modes = best_threshold(judged, SP, TP)
    assert threshold < 1
    assert modes == [SP, SP]


def test_choices_are_scored_against_the_faster_mode_of_each_step():
    judged = [step(1, 2.0, 1.0), step(64, 1.0, 1.05), step(65, 4.0, 8.0)]
    assert score(judged, [TP, SP, SP]) == ["1.000x", "1.000x", "1.00x", "2 of 2"]
    assert score(judged, [SP, TP, TP]) == ["1.842x", "1.613x", "2.00x", "0 of 2"]


@pytest.mark.thorough
@pytest.mark.distributed
def test_it_judges_a_model_on_real_ranks(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "steps.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "judge_policy.py",
            "--model",
            str(folder),
            "--steps",
            "4",
            "--repeats",
            "2",
            "--calibration-seconds",
            "1",
            "--max-num-batched-tokens",
            "64",
            "--output",
            str(output),
        ],
    )
    judge_policy.main()
    printed = capsys.readouterr().out
    assert "adaptive" in printed
    assert "4 steps; other programs kept" in printed
    steps = json.loads(output.read_text())
    assert all(set(step["ms"]) == {"sp2xtp1", "sp1xtp2"} for step in steps)
