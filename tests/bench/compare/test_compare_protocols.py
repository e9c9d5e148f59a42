"""The requests of every protocol, and their order."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.compare.synthetic import INPUTS, SIZES
from ulysses_infer.bench.compare.compare_bench import order
from ulysses_infer.bench.compare.contenders import CONTENDERS, GROUP, REPLICAS, speculating
from ulysses_infer.bench.compare.measuring import Site
from ulysses_infer.bench.compare.protocols import (
    NUM_BURSTS,
    PROTOCOLS,
    SCALES,
    Capacity,
    ComparisonCase,
    ProtocolInputs,
)
from ulysses_infer.bench.compare.servers import server_overrides
from ulysses_infer.bench.serve.repetition import REPETITIVE
from ulysses_infer.config import load_config
from ulysses_infer.errors import ConfigError


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "talk.jsonl"
    rows = [
        {"timestamp": 100 * n, "input_length": 600 + n, "output_length": 9 * n, "hash_ids": [0, n + 1]}
        for n in range(500)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cases_of(name: str, inputs: ProtocolInputs = INPUTS) -> list[ComparisonCase]:
    return PROTOCOLS[name].cases(inputs)


def test_the_shape_is_measured_alone_and_saturated():
    lone, saturated = cases_of("shape")
    assert (lone.kind, len(lone.rows)) == ("lone", 2)
    assert (saturated.kind, len(saturated.rows)) == ("saturated", 8)
    assert {(row.at, row.input_len, row.output_len) for row in (*lone.rows, *saturated.rows)} == {(0.0, 100, 10)}


def test_longer_contexts_have_fewer_requests():
    cases = cases_of("context")
    assert [(case.x, case.kind) for case in cases] == [
        (length, kind) for length in SIZES.contexts for kind in ("lone", "saturated")
    ]
    counts = [len(case.rows) for case in cases if case.kind == "saturated"]
    assert counts == [8, 4, 2]


def test_rates_are_shares_of_the_capacity():
    cases = cases_of("rate")
    assert [case.x for case in cases] == [1.0, 2.0, 3.0, 4.0]
    assert [len(case.rows) for case in cases] == [10, 20, 30, 40]
    assert all(5 < case.rows[-1].at <= SIZES.seconds for case in cases)


def test_answers_that_repeat_are_measured_alone_and_saturated():
    cases = cases_of("repetition")
    assert [case.name for case in cases] == [f"{name}-{kind}" for name in REPETITIVE for kind in ("lone", "saturated")]
    assert [case.dataset for case in cases[::2]] == [*REPETITIVE]
    items = Site(None, "m", None).items(cases[1], 3)
    assert len(items) == 8
    assert {item.output_len for item in items} == {10}
    assert all(isinstance(item.content, str) for item in items)


def test_methods_of_speculation_have_servers_of_their_own():
    config = load_config(None, ["model.path=m", "parallel.sp=2", "speculation.method=suffix"])
    methods = {name: server_overrides(name, config, 2, True, True) for name in (GROUP, REPLICAS, "ngram")}
    assert [keys["speculation.method"] for keys in methods.values()] == ["none", "none", "ngram"]
    assert methods["ngram"]["policy.name"] == "adaptive"
    assert {**methods[GROUP], "speculation.method": "ngram"} == methods["ngram"]
    contenders = [CONTENDERS["tp"], speculating("ngram")]
    servers = [each.server for _, _, each in order(cases_of("shape"), contenders, 1, True)]
    assert servers == [GROUP, GROUP, "ngram", "ngram"]


def test_four_bursts_stand_out_of_a_low_stream():
    (case,) = cases_of("bursty")
    assert [row.at for row in case.rows] == sorted(row.at for row in case.rows)
    at_once = [(at, count) for at, count in Counter(row.at for row in case.rows).items() if count > 1]
    assert at_once == [(1.25, 4), (3.75, 4), (6.25, 4), (8.75, 4)]
    assert len(at_once) == NUM_BURSTS
    assert len(case.rows) == 4 * 4 + 4


def test_a_trace_is_fitted_to_the_machine_and_the_model(trace):
    inputs = dataclasses.replace(INPUTS, traces=[trace], max_model_len=400)
    (case,) = cases_of("trace", inputs)
    assert case.rows[-1].at == pytest.approx(SIZES.seconds, rel=0.1)
    assert all(row.input_len + row.output_len <= 400 for row in case.rows)
    tokens = sum(row.input_len + row.output_len for row in case.rows)
    assert tokens / SIZES.seconds == pytest.approx(INPUTS.capacity.tokens / 2, rel=0.1)
    assert case.block_tokens == pytest.approx(512 * 100 / 849.5, rel=0.01)
    assert {row.hash_ids[0] for row in case.rows} == {0}


@settings(deadline=None)
@given(st.floats(0.05, 1e3), st.integers(16, 200_000), st.sampled_from(sorted(SCALES)))
def test_no_case_is_empty_or_longer_than_the_model_takes(per_second, max_model_len, scale):
    sizes = dataclasses.replace(SCALES[scale].fitting(max_model_len), seconds=1.0)
    inputs = ProtocolInputs(sizes, Capacity(per_second, per_second * 100), max_model_len)
    cases = [case for name in ("shape", "context", "rate", "bursty") for case in cases_of(name, inputs)]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.rows
        assert all(row.input_len >= 1 and row.input_len + row.output_len <= max_model_len for row in case.rows)


def test_a_model_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match="no room"):
        SIZES.fitting(0)


@pytest.mark.parametrize("in_turn", [False, True])
def test_every_contender_runs_every_case_once_per_repeat(in_turn):
    cases, contenders = cases_of("shape"), list(CONTENDERS.values())
    steps = list(order(cases, contenders, 3, in_turn))
    assert len(steps) == len(set(map(str, steps))) == 3 * len(cases) * len(contenders)


def test_repeats_are_interleaved_and_rotate_the_first_contender():
    cases, contenders = cases_of("shape"), list(CONTENDERS.values())
    steps = list(order(cases, contenders, 2, False))
    assert [contender.name for _, _, contender in steps[:5]] == ["dp", "tp", "sp", "shift", "adaptive"]
    assert [contender.name for _, _, contender in steps[10:15]] == ["tp", "sp", "shift", "adaptive", "dp"]
    assert [case.name for _, case, _ in steps[:10]] == ["shape-lone"] * 5 + ["shape-saturated"] * 5


def test_servers_in_turn_are_started_once_per_repeat():
    servers = [c.server for _, _, c in order(cases_of("shape"), list(CONTENDERS.values()), 2, True)]
    switches = sum(a != b for a, b in pairwise(servers))
    assert switches == 3


def test_servers_use_the_same_ranks_in_their_own_way():
    config = load_config(None, ["model.path=m", "parallel.sp=2", "parallel.tp=2"])
    group = server_overrides(GROUP, config, 4, True, True)
    replicas = server_overrides(REPLICAS, config, 4, True, True)
    assert [group[f"parallel.{key}"] for key in ("dp", "sp", "tp")] == ["1", "2", "2"]
    assert group["policy.name"] == "adaptive"
    assert [replicas[f"parallel.{key}"] for key in ("dp", "sp", "tp")] == ["4", "1", "1"]
    assert replicas["policy.name"] == "static"
    assert "cache.memory_utilization" not in group
    other = server_overrides(GROUP, config, 8, False, False)
    assert [other[f"parallel.{key}"] for key in ("sp", "tp")] == ["8", "1"]
    assert float(other["cache.memory_utilization"]) < 0.5
    keys = [f"{key}={value}" for key, value in replicas.items() if "oc." not in value]
    loaded = load_config(None, ["model.path=m", *keys])
    assert loaded.parallel.num_ranks == 4
