"""Speculation in virtual time: drafted tokens change times, never what a request outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.plans import config, llama_sizes
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.node import load_node
from ulysses_infer.planning.planner import Candidate, Evaluation, Planner
from ulysses_infer.planning.recurrent import RecurrentSizes
from ulysses_infer.planning.speculation import parse_speculation, uniform

LONE = [TraceRow(0.0, 100, 61)]
rows = st.lists(
    st.builds(TraceRow, st.floats(0, 0.05), st.integers(1, 900), st.integers(1, 40), st.just(())),
    min_size=1,
    max_size=12,
).map(lambda found: sorted(found, key=lambda row: row.at))
specs = st.builds("ngram:acceptance={},num_tokens={}".format, st.floats(0, 1), st.sampled_from(["auto", 1, 4]))


def evaluated(spec: str, requests: list[TraceRow], policy: str = "adaptive") -> Evaluation:
    own = Planner(llama_sizes(), load_node("8xh200"), config(), speculation=parse_speculation(spec))
    layout = next(layout for layout in own.usable if layout.base == Mode(8, 1))
    return own.evaluate(Candidate(layout, policy, Mode(8, 1), 64), requests, {})


@settings(max_examples=6, deadline=None)
@given(rows, specs, st.sampled_from(["static", "threshold", "adaptive"]))
def test_every_request_ends_with_its_length_and_every_block_returns(requests, spec, policy):
    found, again = evaluated(spec, requests, policy), evaluated(spec, requests, policy)
    assert found.figures == again.figures
    assert found.figures.num_requests == len(requests)
    assert 0 <= found.figures.num_accepted <= found.figures.num_drafted
    assert found.replica.scheduler.allocator.num_used == 0
    outputs = found.figures.output_per_second * found.figures.seconds
    assert outputs == pytest.approx(sum(row.output_len for row in requests))


@pytest.mark.parametrize(("chance", "steps"), [(1, 1 + 60 / 4), (0, 61)])
def test_a_lone_request_takes_as_many_steps_as_its_drafts_leave(chance, steps):
    found = evaluated(f"ngram:acceptance={chance},num_tokens=3", LONE, "static")
    assert len(found.replica.timeline) == steps
    assert found.figures.accepted_share == chance


@settings(max_examples=5, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_better_drafts_are_never_slower(chance, more):
    low, high = sorted((chance, more))
    slow, fast = (evaluated(f"suffix:acceptance={share},num_tokens=3", LONE, "static") for share in (low, high))
    assert fast.figures.latency.mean <= slow.figures.latency.mean * (1 + 1e-9)


def test_tokens_are_right_as_often_as_assumed():
    long = TraceRow(0.0, 100, 400)
    found = evaluated("ngram:acceptance=0.7,num_tokens=1", [long] * 8, "static")
    assert found.figures.accepted_share == pytest.approx(0.7, abs=0.04)
    sparse = evaluated("ngram:num_tokens=1,coverage=0.25", [long], "static")
    assert 0 < sparse.figures.num_drafted < 200


def test_draws_are_even_over_requests_and_positions():
    draws = [uniform(index, position) for index in range(40) for position in range(50)]
    assert all(0 <= draw < 1 for draw in draws)
    assert [sum(draw < limit / 4 for draw in draws) / 2000 for limit in (1, 2, 3)] == pytest.approx(
        [0.25, 0.5, 0.75], abs=0.03
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ngramm", "method 'ngramm' is not one of ngram, suffix"),
        ("draft_model", "method 'draft_model' is not one of ngram, suffix"),
        ("ngram:acceptance=1.5", "acceptance=1.5 is not a number from 0 to 1"),
        ("ngram:coverage=most", "coverage=most is not a number from 0 to 1"),
        ("ngram:num_tokens=0", "num_tokens=0 is neither auto nor a number of at least 1"),
        ("suffix:tokens=4", "'tokens=4' is unknown; give METHOD[:acceptance=P]"),
    ],
)
def test_a_wrong_specification_is_one_line(spec, message):
    with pytest.raises(ConfigError) as error:
        parse_speculation(spec)
    assert f"--speculation {spec}: {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_models_that_the_engine_does_not_speculate_with_are_refused():
    hybrid = replace(
        llama_sizes(), num_attention_layers=1, num_recurrent_layers=3, recurrent=RecurrentSizes(4096, 1024, 65536, 8192)
    )
    with pytest.raises(ConfigError, match="--speculation: model type 'llama' has recurrent layers"):
        Planner(hybrid, load_node("8xh200"), config(), speculation=parse_speculation("ngram"))
