"""Prefill chunks that let decodes keep their target time."""

from __future__ import annotations

import pytest

from tests.engine.test_adaptive import policy
from tests.step_time.costs import MODES, machine
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.policies.chunking import MIN_CHUNK, ChunkSizer
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.scheduler import Scheduler
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.step_time.step_shape import StepShape


def request(index, prompt, outputs=0, arrival=0.0, first_token=None):
    made = Request(str(index), index, [1] * prompt, SamplingParams(max_tokens=500), arrival_time=arrival)
    if outputs:
        made.output_token_ids = [1] * outputs
        made.num_computed_tokens = prompt + outputs - 1
        made.first_token_time = first_token
    return made


def fastest(shape):
    return min(machine(mode, shape) for mode in MODES)


def sizer(tpot, ttft=None, now=0.0):
    return ChunkSizer(tpot, ttft, fastest, clock=lambda: now)


DECODES = [request(index, 100, outputs=10, first_token=0.0) for index in range(8)]


@pytest.mark.parametrize("tpot", [0.02, 0.05, 0.1])
def test_the_step_fits_the_target_and_a_larger_one_would_not(tpot):
    chunk = sizer(tpot).limit([*DECODES, request(9, 3000)], None)
    contexts = [r.num_tokens for r in DECODES]
    assert fastest(StepShape.of(contexts, [(0, chunk)])) <= tpot
    assert fastest(StepShape.of(contexts, [(0, 2 * chunk)])) > 0.9 * tpot


def test_a_larger_target_gives_larger_chunks_and_a_longer_context_smaller_ones():
    long = request(9, 8000)
    chunks = [sizer(tpot).limit([*DECODES, long], None) for tpot in (0.02, 0.05, 0.1, 0.2)]
    assert chunks == sorted(set(chunks))
    long.num_computed_tokens = 4000
    assert sizer(0.1).limit([*DECODES, long], None) < chunks[2]


def test_prompts_go_on_even_where_no_step_can_keep_the_target():
    assert sizer(0.001).limit([*DECODES, request(9, 3000)], None) == MIN_CHUNK


@pytest.mark.parametrize("running", [[], [request(9, 3000)], DECODES])
def test_without_decodes_or_without_prompts_there_is_no_limit(running):
    assert sizer(0.001).limit(running, None) is None
    assert sizer(None, 0.1).limit([*DECODES, request(9, 3000)], None) is None


def test_a_waiting_prompt_is_limited_too():
    assert sizer(0.05).limit(DECODES, request(9, 3000)) == sizer(0.05).limit([*DECODES, request(9, 3000)], None)


def test_a_prompt_that_would_be_late_gets_the_slack_of_the_decodes():
    late = request(9, 3000, arrival=0.0)
    relaxed = sizer(0.05, ttft=60.0).limit([*DECODES, late], None)
    pressed = sizer(0.05, ttft=0.3).limit([*DECODES, late], None)
    assert relaxed == sizer(0.05).limit([*DECODES, late], None)
    assert pressed > relaxed, "ten tokens in no time: half a second of slack"
    behind = sizer(0.05, ttft=0.3, now=10.0).limit([*DECODES, late], None)
    assert behind == relaxed, "there is no slack: the decodes' target comes first"


def small_scheduler(**settings):
    config = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **settings})
    return Scheduler(config, BlockPools([64], 16), max_model_len=512)


def test_the_scheduler_keeps_the_limit_for_prompts_and_decodes_run_anyway():
    scheduler = small_scheduler()
    scheduler.add(request(0, 20))
    scheduler.update(scheduler.schedule(), {0: 7})
    scheduler.add(request(1, 200))
    scheduler.add(request(2, 200))
    batch = scheduler.schedule(max_prefill_tokens=10)
    assert [(item.request.index, item.num_new_tokens) for item in batch.scheduled] == [(0, 1), (1, 10)]
    scheduler.update(batch, {0: 7})
    batch = scheduler.schedule()
    assert [(item.request.index, item.num_new_tokens) for item in batch.scheduled] == [(0, 1), (1, 63)]


@pytest.mark.parametrize("limit", [1, 3, 16])
def test_every_request_ends_under_any_limit(limit):
    scheduler = small_scheduler()
    for index in range(5):
        scheduler.add(Request(str(index), index, [1] * 60, SamplingParams(max_tokens=6), arrival_time=0.0))
    for _ in range(1000):
        if not scheduler.has_unfinished:
            break
        batch = scheduler.schedule(max_prefill_tokens=limit)
        assert not batch.is_empty
        assert batch.num_prefill_tokens <= limit
        scheduler.update(batch, {item.request.index: 7 for item in batch.scheduled if item.samples})
    assert not scheduler.has_unfinished
    scheduler.allocator.assert_idle()


def test_decodes_keep_their_target_under_simulated_load():
    """The real scheduler and policy on a made-up machine: with the target, no gap between tokens is longer."""
    gaps = {target: longest_gap(target) for target in (None, 60.0)}
    assert gaps[60.0] <= 0.060
    assert gaps[None] > 2 * gaps[60.0], "without it a long prompt delays every request"


def longest_gap(target):
    chosen = policy(target_tpot_ms=target)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=2048), BlockPools([2048], 16), 8192)
    for index in range(6):
        scheduler.add(Request(str(index), index, [1] * 50, SamplingParams(max_tokens=200), arrival_time=0.0))
    longest = 0.0
    for step in range(150):
        if step in (20, 60):
            params = SamplingParams(max_tokens=5)
            scheduler.add(Request(f"long {step}", 100 + step, [1] * 4000, params, arrival_time=0.0))
        batch = scheduler.schedule(chosen.prefill_limit(scheduler.running, scheduler.next_waiting))
        decision = chosen.decide(batch)
        seconds = machine(decision.mode, batch.shape)
        chosen.observe(batch, decision, seconds)
        if batch.num_decodes:
            longest = max(longest, seconds)
        scheduler.update(batch, {item.request.index: 7 for item in batch.scheduled if item.samples})
    return longest
