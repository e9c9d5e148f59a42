"""Steps scheduled ahead, before the tokens of the previous step are known, change no output."""

import random

import pytest
import torch

from tests.equivalence.cases import ModeShuffle
from tests.tiny import encode, settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.engine.in_flight import MAX_ASYNC_TOKENS
from ulysses_infer.model.sampling.row import reads_outputs
from ulysses_infer.worker.next_tokens import NextTokenBuffer
from ulysses_infer.worker.transfer import DeviceToHostCopy

PROMPTS = ["hello", "a", "the quick brown fox", "b", "what is it", "x y z", "hello", "so it goes", "the end"]
FREE = [
    SamplingParams(temperature=0, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=1, seed=1, max_tokens=9),
    SamplingParams(temperature=1.5, seed=2, top_k=9, top_p=0.8, max_tokens=17, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(temperature=0, max_tokens=6, logprobs=0, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(temperature=2, seed=3, min_p=0.01, n=3, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=2, seed=4, min_tokens=4, stop_token_ids=encode("aeiou "), max_tokens=20),
    SamplingParams(temperature=2, seed=5, stop=["e", "t", " "], max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1, seed=6, logit_bias={3: 4.0}, allowed_token_ids=encode("abcdefgh"), max_tokens=12),
]
BOUND = [
    SamplingParams(temperature=0, repetition_penalty=1.8, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1, seed=7, structured_outputs={"regex": "[a-z]{3,9}"}, max_tokens=20),
    SamplingParams(temperature=1, seed=8, bad_words=["ab", "ba"], max_tokens=12, ignore_eos=True),
]


def serve(folder, sp, params, num_blocks, is_async):
    """On a rank: the outputs, the number of steps scheduled ahead, and the number of preemptions."""
    chosen = settings(
        sp, **{"cache.num_blocks": num_blocks, "scheduler.async_scheduling": is_async, "runtime.debug": True}
    )
    with init_inference(folder, **chosen) as engine:
        brain, ahead = engine._engine, []
        if brain is not None:
            brain.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
            launch = brain._launch

            def counted(before=None):
                flight = launch(before)
                ahead.extend([flight] if before is not None and flight is not None else [])
                return flight

            brain._launch = counted

        given = [params[index % len(params)] for index in range(2 * len(params))]
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(given))]
        arrivals = [3 * index for index in range(len(given))]
        outputs = engine.generate(prompts, given, arrival_steps=arrivals)
        if brain is not None:
            assert brain._in_flight is None
            brain.scheduler.allocator.assert_idle()
            assert all(flight.plan.num_tokens <= 32 for flight in ahead)
            return [shown(output) for output in outputs], len(ahead), brain.scheduler.num_preemptions
        return [shown(output) for output in outputs], 0, 0


def shown(output):
    return [
        (o.token_ids, o.text, o.finish_reason, o.stop_reason, rounded(o.logprobs), rounded(output.prompt_logprobs))
        for o in output.outputs
    ]


def rounded(entries):
    if entries is None:
        return None
    return [entry and {token: round(value.logprob, 3) for token, value in entry.items()} for entry in entries]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_blocks", [64, 14], ids=["roomy", "tight"])
def test_steps_ahead_give_the_outputs_of_synchronous_steps(rank_pool, folder, world_size, num_blocks):
    pool = rank_pool(world_size)
    (wanted, none, preempted), *_ = pool.run(serve, folder, world_size, FREE, num_blocks, False)
    results = pool.run(serve, folder, world_size, FREE, num_blocks, True)
    assert none == 0
    assert results[0][1] > 20
    assert (preempted > 0) == (num_blocks == 14)
    for outputs, _, _ in results:
        assert outputs == wanted
    reasons = {(output[2], output[3] is None) for outputs in wanted for output in outputs}
    assert reasons >= {("length", True), ("stop", False)}


@pytest.mark.distributed
def test_no_step_runs_ahead_of_requests_whose_next_token_needs_the_last(rank_pool, folder):
    assert all(map(reads_outputs, BOUND))
    assert not any(map(reads_outputs, FREE))
    mixed = [*FREE[:3], *BOUND, *FREE[3:]]
    (wanted, _, _), *_ = rank_pool(2).run(serve, folder, 2, mixed, 64, False)
    for outputs, _, _ in rank_pool(2).run(serve, folder, 2, mixed, 64, True):
        assert outputs == wanted
    (_, ahead, _), *_ = rank_pool(2).run(serve, folder, 2, BOUND, 64, True)
    assert ahead == 0


@pytest.mark.parametrize("seed", range(4))
def test_requests_may_be_aborted_while_their_steps_are_in_flight(folder, seed):
    draw, params = random.Random(seed), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with init_inference(folder, **settings(**{"scheduler.async_scheduling": True})) as engine:
        brain, names, ended = engine._engine, [], {}
        wanted = {prompt: engine.generate(prompt, params)[0].outputs[0].token_ids for prompt in PROMPTS}
        for _ in range(60):
            if draw.random() < 0.4:
                names.append(brain.add(draw.choice(PROMPTS), params))
            if names and draw.random() < 0.3:
                brain.abort(draw.choice(names))
            ended |= {done.request_id: done.output() for done in brain.step() if done.is_finished}
        while brain.has_unfinished:
            ended |= {done.request_id: done.output() for done in brain.step() if done.is_finished}
        assert brain._in_flight is None
        brain.scheduler.allocator.assert_idle()
        assert len(ended) > 5
        assert all(output.outputs[0].token_ids == wanted[output.prompt] for output in ended.values())


def test_aborting_all_requests_forgets_the_in_flight_step_and_its_time(folder):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with init_inference(folder, **settings(**{"scheduler.async_scheduling": True})) as engine:
        brain = engine._engine
        brain.add("hello", params)
        brain.step()
        assert brain._in_flight is not None
        brain.abort_all()
        assert brain._in_flight is None
        assert brain.step() == []


def test_steps_with_many_tokens_are_not_followed_before_they_end(folder):
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    changes = {"scheduler.max_num_batched_tokens": 2 * MAX_ASYNC_TOKENS, "cache.num_blocks": 600}
    with init_inference(folder, **settings(**changes, **{"scheduler.async_scheduling": True})) as engine:
        brain = engine._engine
        followed = []
        for count, length in (4, 10), (8, 100):
            assert (count * length > MAX_ASYNC_TOKENS) == (count == 8)
            for number in range(count):
                brain.add([number + 1] * length, params)
            brain.step()
            followed.append(brain._in_flight is not None)
            brain.abort_all()
        assert followed == [True, False]


def test_null_is_off_on_a_cpu(folder):
    with init_inference(folder, **settings()) as engine:
        engine._engine.add("hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        engine._engine.step()
        assert engine._engine._in_flight is None
        engine._engine.abort_all()


def test_placeholder_tokens_are_replaced_by_sampled_ones():
    next_tokens, ids = NextTokenBuffer(None), torch.tensor([7, -1, 9, -3, -2])
    next_tokens.share(torch.tensor([4, -1, 6]), 3, torch.device("cpu"))
    next_tokens.fill_placeholders(ids)
    assert ids.tolist() == [7, 4, 9, 6, 0]


def test_copies_to_the_host_are_complete_at_once_on_a_cpu():
    assert DeviceToHostCopy(torch.tensor([3, 1])).wait() == [3, 1]
