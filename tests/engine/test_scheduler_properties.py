"""Random operations on many requests; `Simulation` checks every step and every output."""

import random
from contextlib import nullcontext

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_simulation import Simulation

from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.errors import RequestError

PREFIX = [0, 1, 2, 3, 0, 2, 1, 3, 3, 0, 1, 2]
prompts = st.builds(
    lambda shared, own: PREFIX[:shared] + own or [0],
    st.integers(0, len(PREFIX)),
    st.lists(st.integers(0, 4), max_size=8),
)
GROUPS = (
    (AttentionSpan(),),
    (AttentionSpan(), AttentionSpan(5)),
    (AttentionSpan(), AttentionSpan(9), AttentionSpan(1), AttentionSpan(chunk_size=6)),
    (AttentionSpan(7),),
    (AttentionSpan(chunk_size=8), AttentionSpan(3)),
)
groups = st.sampled_from(GROUPS)
TIERS = (None, None, (1, 0), (3, 0), (2, 4), (40, 1))
"""Slots in host memory and on disk."""


class RandomLives(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 4),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 24),
        enable_chunked_prefill=st.booleans(),
        attention_spans=groups,
        snapshots=st.sampled_from([None, None, 0, 1, 3, 20]),
        snapshot_blocks=st.integers(1, 4),
        tier=st.sampled_from(TIERS),
    )
    def start(self, **config):
        self.simulation = Simulation(max_model_len=26, **config)
        self.in_flight = None

    @rule(
        prompt=prompts,
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "", "tenant"]),
        max_tokens=st.sampled_from([1, 2, 5, 12, None]),
        min_tokens=st.integers(0, 1),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([[], [], [3]]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(self, prompt, **params):
        config, allocator = self.simulation.config, self.simulation.allocator
        longest = min(len(prompt) + (params["max_tokens"] or 26), 26) - 1
        too_long = allocator.most_blocks(longest, config.max_num_batched_tokens) > allocator.num_blocks
        too_wide = not config.enable_chunked_prefill and len(prompt) > config.max_num_batched_tokens
        with pytest.raises(RequestError) if too_long or too_wide else nullcontext():
            self.simulation.add(prompt, **params)

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def schedule(self):
        self.in_flight = self.simulation.schedule()

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def update(self):
        self.simulation.finish_step(self.in_flight)
        self.in_flight = None

    @precondition(lambda self: self.in_flight is not None and not self.in_flight.lacks_room)
    @rule()
    def schedule_ahead(self):
        following = self.simulation.schedule(ahead=True)
        self.simulation.finish_step(self.in_flight)
        self.in_flight = None if following.is_empty else following

    @precondition(lambda self: self.in_flight is None)
    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            self.simulation.step()

    @precondition(lambda self: self.simulation.requests)
    @rule(data=st.data(), how=st.sampled_from(["abort", "finish"]))
    def end(self, data, how):
        """In any state: waiting, mid-prefill, decoding, preempted, in an in-flight step, finished."""
        request = data.draw(st.sampled_from(self.simulation.requests))
        finished = request.is_finished
        if how == "abort":
            assert self.simulation.scheduler.abort(request.request_id) is (None if finished else request)
        elif not finished:
            self.simulation.scheduler.finish(request, "stop", "END")
        assert request.is_finished
        self.simulation.check_blocks()

    @rule()
    def reset_prefix_cache(self):
        idle = self.simulation.scheduler.num_running == 0
        assert self.simulation.allocator.reset_prefix_cache() == idle

    @invariant()
    def counts_add_up(self):
        if hasattr(self, "simulation"):
            scheduler = self.simulation.scheduler
            unfinished = sum(not r.is_finished for r in self.simulation.requests)
            assert scheduler.num_running + scheduler.num_waiting == unfinished
            assert scheduler.has_unfinished == (unfinished > 0)

    def teardown(self):
        if hasattr(self, "simulation"):
            if self.in_flight is not None:
                self.update()
            self.simulation.run()


def random_request(source):
    """Arguments of a request that fits any cache of 26 tokens; many share a prefix."""
    prompt = PREFIX[: source.randint(0, 12)] + [source.randint(0, 4) for _ in range(source.randint(1, 8))]
    return {
        "prompt": prompt,
        "priority": source.randint(0, 2),
        "max_tokens": source.choice([1, 2, 5, 12, None]),
        "ignore_eos": source.random() < 0.7,
        "prompt_logprobs": source.choice([None, None, 0]),
    }


@example(seed=640)  # two requests of one step start from snapshots of the tier, and there is one slot
@given(seed=st.integers(0, 2**32))
@settings(max_examples=75, deadline=None)
def test_requests_that_preempt_displace_and_share_give_the_outputs_they_give_alone(seed):
    source = random.Random(seed)
    block_size = source.randint(1, 4)
    simulation = Simulation(
        num_blocks=-(-25 // block_size) + source.randint(0, 8),
        block_size=block_size,
        max_model_len=26,
        caching=source.random() < 0.7,
        policy=source.choice(["fcfs", "priority"]),
        max_num_seqs=source.randint(1, 5),
        max_num_batched_tokens=source.randint(20, 30) if (whole := source.random() < 0.3) else source.randint(1, 24),
        enable_chunked_prefill=not whole,
        attention_spans=source.choice(GROUPS),
        snapshots=source.choice([None, None, 0, 1, 3, 20]),
        snapshot_blocks=source.randint(1, 4),
        tier=source.choice(TIERS),
    )
    for _ in range(40):
        if source.random() < 0.5:
            simulation.add(**random_request(source))
        batch = simulation.schedule()
        if source.random() < 0.1 and simulation.requests:
            simulation.scheduler.abort(source.choice(simulation.requests).request_id)
        while source.random() < 0.8 and not batch.lacks_room:
            following = simulation.schedule(ahead=True)
            simulation.finish_step(batch)
            batch = following
        simulation.finish_step(batch)
    simulation.run()


TestRandomLives = RandomLives.TestCase
TestRandomLives.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
