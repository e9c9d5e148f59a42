"""Speculation changes no output: greedy and seeded requests with any options, in modes that flip from step to step.

Each batch runs twice on the same engine, with and without drafted tokens.
"""

import functools
import random

import hypothesis
import pytest

from tests.distributed.drafted_requests import SCHEMA, TEXTS, assert_equal, batches
from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import ConfigError

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    tiny_llama(made)
    return str(made)


@functools.cache
def engine_of(folder, ranks, method, tokens, **changes):
    """Few blocks, so that requests are preempted. A process can have one engine of two ranks only."""
    chosen = settings(ranks, **{"cache.num_blocks": 45, "scheduler.max_num_batched_tokens": 24, **changes})
    chosen |= {"speculation.method": method, "speculation.num_tokens": tokens}
    return init_inference(folder, **chosen)


@pytest.fixture(scope="module")
def engines(folder):
    started = []

    def start(*arguments, **changes):
        inference = engine_of(folder, *arguments, **changes)
        if inference not in started:
            started.append(inference)
            draw, modes = random.Random(0), inference.config.parallel.available_modes
            inference._engine.choose_mode = lambda _: draw.choice(modes)
        return inference._engine

    yield start
    for inference in started:
        inference.shutdown()
    engine_of.cache_clear()


def complete(engine, batch, speculation, abort=None):
    """The outputs of a batch. abort: chooses requests to abort between steps; only the others are returned."""
    names = [engine.add(text, SamplingParams(**wanted, speculation=speculation)) for text, wanted in batch]
    outputs = {}
    while engine.has_unfinished:
        outputs |= {completion.request_id: completion.output() for completion in engine.step()}
        if abort is not None and abort.random() < 0.2:
            engine.abort(abort.choice(names))
    assert engine.scheduler.allocator.num_used == 0
    assert not engine.requests.sequences
    return [outputs.get(name) for name in names]


def check(engine, batch):
    without, with_drafts = complete(engine, batch, False), complete(engine, batch, True)
    for expected, output in zip(without, with_drafts, strict=True):
        assert_equal(output, expected)


REPEATING = [
    ("abcabcabcabcabc", {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "frequency_penalty": -2}),
    ("hello hello hello", {"temperature": 0.4, "seed": 3, "max_tokens": 60, "ignore_eos": True, "logprobs": 1}),
    ("{", {"temperature": 0.7, "seed": 3, "max_tokens": 60, "structured_outputs": {"json": SCHEMA}, "n": 2}),
]


@pytest.mark.parametrize(("ranks", "method", "tokens"), [(1, "ngram", "auto"), (1, "suffix", 5), (2, "suffix", "auto")])
def test_drafts_are_accepted_and_outputs_are_equal(engines, ranks, method, tokens):
    engine = engines(ranks, method, tokens)
    engine.speculation.reset_stats()
    check(engine, REPEATING)
    stats = engine.speculation.stats
    assert tokens == "auto" or stats.num_accepted_tokens > 20  # auto depends on measured times
    assert sum(stats.accepted_per_position) == stats.num_accepted_tokens <= stats.num_draft_tokens


@pytest.mark.parametrize(("ranks", "method", "tokens"), [(1, "ngram", 3), (2, "suffix", "auto")])
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(batch=batches)
def test_any_options_give_the_outputs_without(engines, ranks, method, tokens, batch):
    check(engines(ranks, method, tokens), batch)


def test_steps_ahead_give_the_same_outputs(engines):
    engine = engines(1, "ngram", 4, **{"scheduler.async_scheduling": True})
    batch = [(text, {"max_tokens": 50, "temperature": 0, "ignore_eos": True}) for text in TEXTS]
    check(engine, batch)
    assert engine.speculation.stats.num_accepted_tokens > 0


def test_a_lone_request_stays_on_recorded_steps(engines):
    engine = engines(1, "ngram", 4)
    batch = [("abcabcabcabcabc", {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "frequency_penalty": -2})]
    complete(engine, batch, True)
    replayed, run = [], engine.worker.graphs.run
    engine.worker.graphs.run = lambda step, finish: replayed.append(step.plan.num_tokens) or run(step, finish)
    steps = len(engine.stats.recent)
    complete(engine, batch, True)
    engine.worker.graphs.run = run
    assert len(replayed) >= len(engine.stats.recent) - steps - 3
    assert max(replayed) == 5


def test_rejection_sampling_differs_only_for_sampled_tokens(engines):
    engine = engines(1, "suffix", 4, **{"speculation.acceptance": "rejection"})
    check(engine, [(text, {"max_tokens": 40, "temperature": 0, "ignore_eos": True}) for text in TEXTS])
    drawn = [(TEXTS[0], {"max_tokens": 40, "temperature": 1.0, "seed": seed, "ignore_eos": True}) for seed in range(3)]
    first, again = (complete(engine, drawn, True) for _ in range(2))
    assert all(len(output.outputs[0].token_ids) == 40 for output in first)
    assert [len(output.outputs[0].token_ids) for output in again] == [40] * 3


def test_outputs_do_not_depend_on_the_outputs_of_others(engines):
    engine = engines(1, "suffix", 5)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    outputs = []
    for salt in ("a", "b", "a"):
        name = engine.add(TEXTS[0], params, cache_salt=salt)
        while engine.has_unfinished:
            done = {completion.request_id: completion.output() for completion in engine.step()}
        outputs.append(done[name].outputs[0].token_ids)
    assert outputs[0] == outputs[1] == outputs[2]


def test_aborts_return_all_blocks(engines):
    source = random.Random(1)
    for _ in range(6):
        complete(engines(1, "suffix", 5), REPEATING, True, abort=source)


def abort_many(engine, count, source):
    """Keep requests running and abort them at random moments, `count` in all."""
    running, aborted = [], 0
    while aborted < count:
        while len(running) < 6:
            text, wanted = source.choice(REPEATING)
            running.append(engine.add(text, SamplingParams(**wanted)))
        ended = {completion.request_id for completion in engine.step() if completion.is_finished}
        running = [name for name in running if name not in ended]
        if running and source.random() < 0.5:
            aborted += engine.abort(running.pop(source.randrange(len(running)))) is not None
    for name in running:
        engine.abort(name)


@pytest.mark.thorough
@pytest.mark.parametrize(("ranks", "tokens", "count"), [(1, 5, 1000), (2, "auto", 200)])
def test_a_thousand_aborts_return_all_blocks(engines, ranks, tokens, count):
    engine = engines(ranks, "suffix", tokens)
    engine.speculation.reset_stats()
    abort_many(engine, count, random.Random(2))
    while engine.has_unfinished:
        engine.step()
    assert engine.scheduler.allocator.num_used == 0
    assert not engine.requests.sequences
    assert engine.speculation.stats.num_draft_tokens > 0


@pytest.mark.thorough
@pytest.mark.parametrize(("ranks", "method", "tokens"), [(1, "ngram", "auto"), (1, "suffix", 5), (2, "suffix", "auto")])
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(batch=batches)
def test_many_options_give_the_outputs_without(engines, ranks, method, tokens, batch):
    check(engines(ranks, method, tokens), batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculation.num_tokens": 0}, "speculation.num_tokens = 0"),
        ({"speculation.num_tokens": -2}, "give auto, or a number of at least 1"),
        ({"speculation.num_tokens": "many"}, "give auto, or a number of at least 1"),
        ({"speculation.num_tokens": 24}, "less than scheduler.max_num_batched_tokens = 24"),
        ({"speculation.min_match": 40}, "at most speculation.max_match = 32"),
        ({"speculation.method": "medusa"}, "choose from none, ngram, suffix"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(folder, changes, message):
    chosen = settings(1, **{"speculation.method": "ngram", "scheduler.max_num_batched_tokens": 24, **changes})
    with pytest.raises(ConfigError, match=message) as refusal:
        init_inference(folder, **chosen)
    assert "\n" not in str(refusal.value)


def test_the_mode_and_the_draft_are_explained_together(folder):
    chosen = settings(1, **{"speculation.method": "ngram", "policy.name": "adaptive", "policy.calibration_seconds": 0})
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, frequency_penalty=-2)
    with init_inference(folder, **chosen) as engine:
        engine.generate(["abcabcabcabc"], params)
        explained = [step.explain() for step in engine.recent_steps]
    assert any("proposed tokens" in line and "predicted" in line for line in explained)
