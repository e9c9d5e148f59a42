"""The metrics: names, buckets, arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.observe.traffic import SP, TP, make_ready, make_state, make_step
from ulysses_infer.config import Config
from ulysses_infer.server.client import RequestRecord
from ulysses_infer.server.messages import OffloadCounts, SpeculationCounts
from ulysses_infer.server.observe import Observatory

FIRST_TOKEN = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
INTER_TOKEN = ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"
REQUEST = ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"


@pytest.fixture
def observatory() -> Observatory:
    config = Config()
    config.server.served_model_name = "models/demo"
    return Observatory(config)


def samples(observatory: Observatory) -> dict[tuple[str, frozenset], float]:
    families = text_string_to_metric_families(observatory.metrics_text().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(observatory: Observatory, name: str, **labels: str) -> float | None:
    labels.setdefault("model_name", "models/demo")
    return samples(observatory).get((f"ulysses:{name}", frozenset(labels.items())))


def record(**changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "num_cached_tokens": 16,
        "scheduled_time": 100.5,
        "first_token_time": 101.0,
        "last_token_time": 103.0,
        "finish_time": 103.25,
        "num_output_tokens": 5,
        "finish_reason": "stop",
    }
    return RequestRecord("r", 100.0, 40, 1, **(values | changes))


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("time_to_first_token_seconds", FIRST_TOKEN),
        ("inter_token_latency_seconds", INTER_TOKEN),
        ("e2e_request_latency_seconds", REQUEST),
        ("request_queue_time_seconds", REQUEST),
        ("request_prefill_time_seconds", REQUEST),
        ("request_decode_time_seconds", REQUEST),
        ("request_inference_time_seconds", REQUEST),
    ],
)
def test_latencies_have_the_usual_buckets(observatory: Observatory, name: str, bounds: str) -> None:
    found = {float(dict(labels)["le"]) for metric, labels in samples(observatory) if metric == f"ulysses:{name}_bucket"}
    assert found == {float(bound) for bound in bounds.split()} | {float("inf")}


def test_each_stage_of_a_request_is_the_time_between_its_moments(observatory: Observatory) -> None:
    observatory.on_finish(record())
    expected = {
        "e2e_request_latency_seconds": 3.25,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 0.5,
        "request_decode_time_seconds": 2.0,
        "request_inference_time_seconds": 2.5,
        "request_time_per_output_token_seconds": 0.5,
        "request_prompt_tokens": 40,
        "request_generation_tokens": 5,
    }
    assert {name: value(observatory, f"{name}_sum") for name in expected} == expected
    assert value(observatory, "request_success_total", finished_reason="stop") == 1


def test_a_request_that_left_while_it_waited_has_only_the_stages_it_reached(observatory: Observatory) -> None:
    nothing = dict.fromkeys(("scheduled_time", "first_token_time", "last_token_time"))
    observatory.on_finish(record(**nothing, num_output_tokens=0, finish_reason="abort"))
    assert value(observatory, "e2e_request_latency_seconds_count") == 1
    assert value(observatory, "request_queue_time_seconds_count") == 0
    assert value(observatory, "request_decode_time_seconds_count") == 0
    assert value(observatory, "request_time_per_output_token_seconds_count") == 0
    assert value(observatory, "request_success_total", finished_reason="abort") == 1


def test_every_generated_token_is_counted_once_by_whatever_event(observatory: Observatory) -> None:
    request = record(num_output_tokens=1, finish_reason=None)
    observatory.on_first_token(request)
    request.num_output_tokens = 3  # the first token of another sequence has no event of its own
    observatory.on_tokens(request, 0.02)
    assert value(observatory, "generation_tokens_total") == 3
    request.num_output_tokens = 4
    observatory.on_finish(request)
    assert value(observatory, "generation_tokens_total") == 4
    assert value(observatory, "prompt_tokens_total") == 40
    assert value(observatory, "inter_token_latency_seconds_count") == 1
    assert value(observatory, "time_to_first_token_seconds_sum") == 1.0


def test_running_totals_become_counters(observatory: Observatory) -> None:
    for queries, hits, preemptions in ((100, 20, 0), (150, 60, 2), (150, 60, 2)):
        state = make_state(prefix_cache_queries=queries, prefix_cache_hits=hits, num_preemptions=preemptions)
        observatory.on_step(state, None)
    assert value(observatory, "prefix_cache_queries_total") == 150
    assert value(observatory, "prefix_cache_hits_total") == 60
    assert value(observatory, "num_preemptions_total") == 2
    observatory.on_step(make_state(prefix_cache_queries=10), None)  # counted from 0 again
    assert value(observatory, "prefix_cache_queries_total") == 160


def test_the_tier_below_the_cache_has_vllms_names(observatory: Observatory) -> None:
    for hits in (10, 25):
        observatory.on_step(make_state(offload=OffloadCounts(100, hits, 4096, 1024, 0.5, 0.25)), None)
    assert value(observatory, "external_prefix_cache_queries_total") == 100
    assert value(observatory, "external_prefix_cache_hits_total") == 25
    assert value(observatory, "kv_offload_store_bytes_total") == 4096
    assert value(observatory, "kv_offload_load_bytes_total") == 1024
    assert value(observatory, "kv_offload_cpu_cache_usage_perc") == 0.5
    assert value(observatory, "kv_offload_disk_cache_usage_perc") == 0.25


def test_steps_and_switches_are_counted_by_mode(observatory: Observatory) -> None:
    for sequence, mode in enumerate((SP, TP, TP, SP)):
        collectives = {"all_to_all": 0.125}
        step = make_step(sequence, 0.0, mode=mode, num_tokens=10, seconds=0.25, collective_seconds=collectives)
        observatory.on_step(make_state(), step)
    assert value(observatory, "steps_total", mode="sp4xtp1") == 2
    assert value(observatory, "tokens_total", mode="sp1xtp4") == 20
    assert value(observatory, "step_seconds_sum", mode="sp4xtp1") == 0.5
    assert value(observatory, "mode_switches_total", **{"from": "sp4xtp1", "to": "sp1xtp4"}) == 1
    assert value(observatory, "mode_switches_total", **{"from": "sp1xtp4", "to": "sp4xtp1"}) == 1
    assert value(observatory, "collective_seconds_total", op="all_to_all", mode="sp4xtp1") == 0.25
    assert value(observatory, "iteration_tokens_total_sum") == 40


def test_gauges_follow_the_engines_state(observatory: Observatory) -> None:
    assert value(observatory, "engine_up") == 0
    observatory.on_ready(make_ready())
    observatory.on_step(make_state(num_running=3, num_waiting=2, kv_cache_usage=0.5), None)
    assert value(observatory, "engine_up") == 1
    assert value(observatory, "num_requests_running") == 3
    assert value(observatory, "num_requests_waiting") == 2
    assert value(observatory, "kv_cache_usage_perc") == 0.5
    observatory.on_dead("over")
    assert value(observatory, "engine_up") == 0


def test_only_the_current_policy_is_exported(observatory: Observatory) -> None:
    for policy in ({"name": "static", "mode": [1, 4]}, {"name": "threshold", "threshold_tokens": 8}):
        observatory.on_step(make_state(policy=policy), None)
    found = [dict(labels) for name, labels in samples(observatory) if name == "ulysses:policy_info"]
    assert found == [{"model_name": "models/demo", "policy": "threshold", "settings": "threshold_tokens=8"}]


def test_the_served_name_is_the_label(observatory: Observatory) -> None:
    config = Config()
    config.server.served_model_name = 'a "quoted"\nname'
    named = Observatory(config)
    assert value(named, "engine_up", model_name='a "quoted"\nname') == 0


def test_two_observatories_do_not_share_their_metrics(observatory: Observatory) -> None:
    config = Config()
    config.server.served_model_name = "models/demo"
    Observatory(config).on_ready(make_ready())
    assert value(observatory, "engine_up") == 0


def test_tokens_of_experts_are_counted_for_each_rank(observatory: Observatory) -> None:
    observatory.on_step(make_state(), None)
    assert value(observatory, "expert_tokens_total", rank="0") is None
    for counts in ([5, 7], [9, 7]):
        observatory.on_step(make_state(expert_tokens=counts), None)
    assert [value(observatory, "expert_tokens_total", rank=rank) for rank in "01"] == [9, 7]


def test_drafted_and_accepted_tokens_have_the_usual_names(observatory: Observatory) -> None:
    for counts in (SpeculationCounts(1, 3, 1, [1, 0, 0]), SpeculationCounts(3, 9, 5, [3, 2, 0])):
        observatory.on_step(make_state(speculation=counts), None)
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    assert [value(observatory, f"spec_decode_{name}_total") for name in names] == [3, 9, 5]
    name = "spec_decode_num_accepted_tokens_per_pos_total"
    assert [value(observatory, name, position=position) for position in "012"] == [3, 2, 0]
