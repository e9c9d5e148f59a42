"""Drafted tokens in the scheduler: whatever is proposed, outputs, slots and blocks are those of a run without."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import Simulation, lone_output, next_token, small_simulation
from test_scheduler_properties import GROUPS, random_request


def proposals(simulation, source, most):
    """For each running request some tokens that follow, the last ones often wrong."""
    drafts = {}
    for request in simulation.scheduler.running:
        text = [*request.prompt_token_ids, *request.output_token_ids]
        drafts[request.index] = draft = []
        for _ in range(source.randint(0, most)):
            draft.append(next_token(tuple(text + draft)) if source.random() < 0.8 else source.randint(0, 4))
    return drafts


def run(seed, abort=0.0):
    """Random requests with random drafts to the end; returns the simulation."""
    source = random.Random(seed)
    block_size = source.randint(1, 4)
    simulation = Simulation(
        num_blocks=-(-26 // block_size) + source.randint(0, 6),
        block_size=block_size,
        max_model_len=26,
        attention_spans=source.choice(GROUPS),
        caching=source.random() < 0.7,
        snapshots=source.choice([None, None, 0, 1, 3, 20]),
        max_num_seqs=source.randint(1, 5),
        max_num_batched_tokens=source.randint(2, 24),
        policy=source.choice(["fcfs", "priority"]),
    )
    waiting = [random_request(source) for _ in range(source.randint(1, 8))]
    while waiting or simulation.scheduler.has_unfinished:
        if waiting and source.random() < 0.4:
            simulation.add(**waiting.pop())
        if not simulation.scheduler.has_unfinished:
            continue
        batch = simulation.schedule(drafts=proposals(simulation, source, 6))
        if source.random() < abort:
            simulation.scheduler.abort(source.choice(simulation.requests).request_id)
        simulation.finish_step(batch)
        simulation.check_blocks()
    simulation.run()
    return simulation


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_drafts_give_the_outputs_without_and_return_all_blocks(seed):
    run(seed)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_aborts_at_random_return_all_blocks(seed):
    run(seed, abort=0.2)


@pytest.mark.thorough
def test_a_thousand_aborts_return_all_blocks():
    ended = 0
    for seed in range(1000):
        simulation = run(seed, abort=0.5)
        ended += sum(request.finish_reason == "abort" for request in simulation.requests)
    assert ended >= 1000


def decoding(draft_of, snapshots=None, **params):
    """A request that has its first output token, one step with the drafts that `draft_of(text)` gives."""
    simulation = small_simulation(num_blocks=16, block_size=4, snapshots=snapshots, snapshot_blocks=8)
    request = simulation.add([1, 2, 3], ignore_eos=True, **{"max_tokens": 12, **params})
    simulation.step()
    text = [*request.prompt_token_ids, *request.output_token_ids]
    batch = simulation.schedule(drafts={request.index: draft_of(text)})
    simulation.finish_step(batch)
    return simulation, request, batch


def right(text, count):
    drafts = []
    for _ in range(count):
        drafts.append(next_token(tuple(text + drafts)))
    return drafts


def test_a_right_draft_gives_one_token_more_than_it_has():
    simulation, request, batch = decoding(lambda text: right(text, 5))
    assert batch.scheduled[0].num_new_tokens == 6
    assert request.num_output_tokens == 1 + 6
    assert request.num_computed_tokens == request.num_tokens - 1
    simulation.run()
    assert request.output_token_ids == lone_output(request, simulation.max_model_len)


def test_a_wrong_draft_goes_back_to_the_accepted_tokens():
    def wrong_at_the_third(text):
        drafts = right(text, 2)
        return [*drafts, (next_token(tuple(text + drafts)) + 1) % 4, 0, 0]

    simulation, request, _ = decoding(wrong_at_the_third)
    assert request.num_output_tokens == 1 + 3
    assert request.num_computed_tokens == request.num_tokens - 1
    assert request.num_published_blocks == request.num_computed_tokens // 4, "only accepted tokens fill a block"
    simulation.run()


def test_with_states_a_wrong_draft_goes_back_to_before_the_step():
    simulation, request, batch = decoding(lambda text: [*right(text, 2), 4, 4], snapshots=4)
    start = batch.scheduled[0].start
    assert request.num_output_tokens == 1 + 3
    assert request.num_computed_tokens == start
    following = simulation.step().scheduled[0]
    assert (following.start, following.num_new_tokens) == (start, 4)
    assert following.restored == batch.scheduled[0].checkpoint
    assert not following.drafts
    simulation.run()
    assert request.output_token_ids == lone_output(request, simulation.max_model_len)


def test_with_states_a_right_draft_needs_no_way_back():
    simulation, request, _ = decoding(lambda text: right(text, 5), snapshots=4)
    assert request.checkpoint is None
    assert request.num_computed_tokens == request.num_tokens - 1
    simulation.run()


def test_without_a_slot_for_their_states_requests_draft_nothing():
    _, _, batch = decoding(lambda text: right(text, 5), snapshots=0)
    assert not batch.num_drafted


def test_no_more_is_drafted_than_the_request_may_output():
    _, request, batch = decoding(lambda text: right(text, 9), max_tokens=4)
    assert len(batch.scheduled[0].drafts) == 2
    assert request.is_finished
    assert request.num_output_tokens == 4


def test_a_stop_token_among_accepted_drafts_ends_the_request_there():
    simulation = small_simulation(num_blocks=16, block_size=4)
    alone = lone_output(simulation.add([1, 2], ignore_eos=True, max_tokens=20), 128)
    stop = alone[5]
    expected = alone[: alone.index(stop) + 1]
    simulation = small_simulation(num_blocks=16, block_size=4)
    request = simulation.add([1, 2], ignore_eos=True, max_tokens=20, stop_token_ids=[stop])
    while not request.is_finished:
        text = [*request.prompt_token_ids, *request.output_token_ids]
        simulation.finish_step(simulation.schedule(drafts={request.index: right(text, 6)}))
    assert request.output_token_ids == expected
    assert (request.finish_reason, request.stop_reason) == ("stop", stop)
    simulation.allocator.assert_idle()


def test_drafts_leave_the_budget_for_every_decode():
    simulation = small_simulation(num_blocks=64, max_num_batched_tokens=8, max_num_seqs=4)
    requests = [simulation.add([token], ignore_eos=True, max_tokens=20) for token in range(4)]
    simulation.step()
    batch = simulation.schedule(drafts={request.index: [0] * 6 for request in requests})
    assert len(batch.scheduled) == 4
    assert batch.num_tokens <= 8
    simulation.finish_step(batch)


def test_drafts_preempt_nobody():
    simulation = small_simulation(num_blocks=8, block_size=4, max_num_seqs=2)
    requests = [simulation.add([token] * 4, ignore_eos=True, max_tokens=8) for token in range(2)]
    while simulation.scheduler.has_unfinished:
        batch = simulation.schedule(drafts={request.index: [0] * 7 for request in requests})
        simulation.finish_step(batch)
    assert simulation.scheduler.num_preemptions == 0


def test_a_step_scheduled_ahead_has_no_drafts_of_unknown_tokens():
    simulation = small_simulation(num_blocks=16, block_size=4)
    request = simulation.add([1], ignore_eos=True, max_tokens=6)
    simulation.step()
    first = simulation.schedule()
    following = simulation.schedule(ahead=True)
    assert not following.num_drafted
    for batch in (first, following):
        simulation.finish_step(batch)
    simulation.run()
    assert request.output_token_ids == lone_output(request, simulation.max_model_len)
