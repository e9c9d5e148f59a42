"""How requests end, and which are refused."""

import pytest
from scheduler_simulation import EOS, prompt, shape, small_simulation

from ulysses_infer.engine.request import Request
from ulysses_infer.errors import RequestError
from ulysses_infer.sampling_params import SamplingParams


@pytest.mark.parametrize("state", ["waiting", "mid_prefill", "running", "preempted", "in_flight"])
def test_abort_ends_a_request_in_any_state_and_returns_its_blocks(state):
    sim = small_simulation(num_blocks=8, max_num_batched_tokens=8)
    other = sim.add(prompt(5), ignore_eos=True, max_tokens=24)
    request = sim.add(prompt(12, 1), ignore_eos=True, max_tokens=20)
    in_flight = None
    if state == "mid_prefill":
        sim.step()
        assert 0 < request.num_computed_tokens < 12
    elif state in ("running", "preempted"):
        while not (request.num_preemptions if state == "preempted" else request.output_token_ids):
            sim.step()
    elif state == "in_flight":
        in_flight = sim.schedule()
    tokens = list(request.output_token_ids)
    assert sim.scheduler.abort(request.request_id) is request
    sim.check_blocks()
    if in_flight:
        assert sim.finish_step(in_flight) == []
    assert (request.finish_reason, request.stop_reason) == ("abort", None)
    assert request.output_token_ids == tokens
    sim.run()
    assert other.finish_reason == "length"


def test_abort_of_a_finished_or_unknown_request_does_nothing():
    sim = small_simulation()
    request = sim.add(prompt(4), ignore_eos=True, max_tokens=1)
    sim.run()
    assert sim.scheduler.abort(request.request_id) is None
    assert sim.scheduler.abort("nobody") is None
    assert request.finish_reason == "length"


def test_an_id_can_be_used_again_once_its_request_has_ended():
    sim = small_simulation()
    first = sim.add(prompt(4), ignore_eos=True)
    batch = sim.schedule()
    sim.scheduler.abort("r0")
    again = Request("r0", 7, prompt(4), SamplingParams(max_tokens=1), arrival_time=0.0)
    sim.scheduler.add(again)
    sim.scheduler.update(batch, {first.index: 1})
    assert again.output_token_ids == []
    assert sim.scheduler.abort("r0") is again


def test_finish_returns_blocks_and_records_the_stop_string():
    sim = small_simulation()
    request = sim.add(prompt(4), ignore_eos=True)
    sim.step()
    sim.scheduler.finish(request, "stop", "END")
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")
    sim.allocator.assert_idle()


def test_a_stop_string_in_the_last_token_allowed_wins_over_the_length():
    sim = small_simulation()
    request = sim.add(prompt(4), ignore_eos=True, max_tokens=1)
    sim.run()
    sim.scheduler.finish(request, "stop", "END")
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")


def end_of(sampled, max_model_len=128, **params):
    """`(tokens, finish reason, stop reason)` of a four-token prompt whose model says `sampled`."""
    sim = small_simulation(max_model_len=max_model_len)
    request = Request("r", 0, prompt(4), SamplingParams(**params), 0.0, eos_token_ids=frozenset({EOS}))
    sim.scheduler.add(request)
    for token in sampled:
        batch = sim.scheduler.schedule()
        finished = sim.scheduler.update(batch, {0: token})
        assert finished == ([request] if request.is_finished else [])
        if finished:
            break
    sim.scheduler.abort("r")
    sim.allocator.assert_idle()
    return len(request.output_token_ids), request.finish_reason, request.stop_reason


@pytest.mark.parametrize(
    ("params", "ending"),
    [
        ({}, (3, "stop", None)),
        ({"ignore_eos": True}, (6, "abort", None)),
        ({"ignore_eos": True, "stop_token_ids": [2]}, (2, "stop", 2)),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, (3, "stop", EOS)),
        ({"stop_token_ids": [2], "min_tokens": 2}, (2, "stop", 2)),
        ({"stop_token_ids": [2], "min_tokens": 3}, (3, "stop", None)),
        ({"min_tokens": 4}, (6, "abort", None)),
        ({"max_tokens": 2}, (2, "length", None)),
        ({"max_tokens": 3}, (3, "stop", None)),
        ({"max_tokens": 4, "min_tokens": 4}, (4, "length", None)),
    ],
)
def test_a_request_ends_at_eos_stop_token_or_max_tokens(params, ending):
    assert end_of([1, 2, EOS, 1, 3, 1], **params) == ending


@pytest.mark.parametrize("max_tokens", [None, 50])
def test_a_request_ends_at_the_model_length(max_tokens):
    params = {"ignore_eos": True, "max_tokens": max_tokens, "min_tokens": 6}
    assert end_of([1] * 10, max_model_len=8, **params) == (4, "length", None)


def test_output_that_may_still_come_is_counted_down():
    sim = small_simulation()
    request = sim.add(prompt(4), ignore_eos=True, max_tokens=3)
    sim.step()
    assert request.max_tokens_left == 2


def test_steps_are_stamped_with_the_clock():
    sim = small_simulation()  # its clock ticks at every reading
    request = sim.add(prompt(4), ignore_eos=True, max_tokens=2)
    sim.run()
    assert request.first_scheduled_time == 0.0
    assert request.first_token_time == 1.0
    assert request.last_token_time == 2.0
    assert request.finish_time == 3.0


def test_scheduling_twice_without_an_update_is_noticed():
    sim = small_simulation()
    sim.add(prompt(4), ignore_eos=True)
    sim.scheduler.schedule()
    with pytest.raises(AssertionError, match="every schedule"):
        sim.scheduler.schedule()


def test_no_more_than_one_step_is_scheduled_ahead():
    sim = small_simulation()
    sim.add(prompt(4), ignore_eos=True)
    sim.scheduler.schedule()
    assert shape(sim.scheduler.schedule(ahead=True)) == {"r0": (4, 1)}
    with pytest.raises(AssertionError, match="every schedule"):
        sim.scheduler.schedule(ahead=True)


def test_a_step_ahead_leaves_out_requests_that_end_with_the_awaited_token():
    sim = small_simulation()
    sim.add(prompt(4), ignore_eos=True, max_tokens=1)
    sim.add(prompt(5, 1), ignore_eos=True, max_tokens=2)
    first = sim.schedule()
    second = sim.schedule(ahead=True)
    assert shape(second) == {"r1": (5, 1)}
    assert [r.request_id for r in sim.finish_step(first)] == ["r0"]
    assert sim.schedule(ahead=True).is_empty
    assert [r.request_id for r in sim.finish_step(second)] == ["r1"]


def test_a_token_computed_ahead_for_a_request_that_has_ended_is_dropped():
    sim = small_simulation()
    request = sim.add(prompt(4), max_tokens=9, ignore_eos=True)
    first = sim.schedule()
    second = sim.schedule(ahead=True)
    sim.finish_step(first)
    sim.scheduler.finish(request, "stop", "END")
    assert sim.finish_step(second) == []
    assert request.num_output_tokens == 1
    sim.allocator.assert_idle()


def test_a_step_ahead_preempts_no_request_and_reports_that_blocks_are_short():
    sim = small_simulation(num_blocks=6)
    sim.add(prompt(8), ignore_eos=True, max_tokens=9)
    sim.add(prompt(7, 1), ignore_eos=True, max_tokens=9)
    batch = sim.schedule()
    assert len(batch.scheduled) == 2
    for _ in range(9):
        following = sim.schedule(ahead=True)
        sim.finish_step(batch)
        batch = following
        if batch.lacks_room:
            break
    assert batch.lacks_room
    assert len(batch.scheduled) < 2
    assert sim.scheduler.num_preemptions == 0
    sim.finish_step(batch)
    assert len(sim.schedule().preempted) == 1


# --- refusals


@pytest.mark.parametrize(
    ("length", "max_tokens", "config", "message"),
    [
        (0, 1, {}, "the prompt has no tokens; give at least one"),
        (32, 1, {}, "has 32 tokens, but prompt and output together have at most 32; shorten it to 31"),
        (40, 1, {}, "has 40 tokens, but prompt and output together have at most 32"),
        (
            20,
            14,
            {"num_blocks": 7},
            r"need 31 tokens of cache \(8 blocks\), but the cache has 28 \(7 blocks\)",
        ),
        (20, 1, {"max_num_batched_tokens": 19, "enable_chunked_prefill": False}, "step takes 19; raise"),
    ],
)
def test_a_request_that_can_never_run_is_refused_in_one_line(length, max_tokens, config, message):
    sim = small_simulation(max_model_len=32, **config)
    with pytest.raises(RequestError, match=message) as refusal:
        sim.add(prompt(length), max_tokens=max_tokens)
    assert "\n" not in str(refusal.value)
    assert not sim.scheduler.has_unfinished


@pytest.mark.parametrize(
    ("length", "max_tokens", "config"),
    [
        (31, 1, {}),
        (20, 9, {"num_blocks": 7}),
        (20, 1, {"max_num_batched_tokens": 20, "enable_chunked_prefill": False}),
    ],
)
def test_the_largest_request_that_can_run_does(length, max_tokens, config):
    sim = small_simulation(max_model_len=32, **config)
    request = sim.add(prompt(length), max_tokens=max_tokens, ignore_eos=True)
    sim.run()
    assert len(request.output_token_ids) == max_tokens


def test_an_id_in_use_is_refused_and_its_owner_unaffected():
    sim = small_simulation()
    sim.add(prompt(4), ignore_eos=True)
    with pytest.raises(RequestError, match="request id 'r0' is in use"):
        sim.scheduler.add(Request("r0", 9, prompt(4), SamplingParams(), arrival_time=0.0))
    sim.run()


@pytest.mark.parametrize(
    ("start", "stop", "tokens"), [(0, 2, [1, 2]), (1, 4, [2, 3, 4]), (3, 5, [4, 5]), (0, 5, [1, 2, 3, 4, 5])]
)
def test_token_ids_run_over_prompt_and_output(start, stop, tokens):
    request = Request("r", 0, [1, 2, 3], SamplingParams(), arrival_time=0.0, output_token_ids=[4, 5])
    assert request.token_ids_from(start, stop) == tokens
