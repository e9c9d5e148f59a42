"""Speculation changes no output: greedy and seeded requests with any options, in modes that flip from step to step.

Each batch runs twice on the same engine, with and without drafted tokens.
"""

import functools
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.tiny import EOS, encode, settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import ConfigError

pytestmark = pytest.mark.distributed
TEXTS = ["abcabcabcabcabc", "hello hello hello", "the quick brown fox", "zz", "{'a': 1, 'a': 1, 'a': "]
SCHEMA = {
    "type": "object",
    "properties": {"a_long_name": {"type": "boolean"}, "another": {"enum": ["aa", "bb"]}},
    "required": ["a_long_name", "another"],
    "additionalProperties": False,
}
structures = st.sampled_from(
    [{"json": SCHEMA, "disable_any_whitespace": True}, {"regex": "(abc){3,9}d"}, {"choice": ["hello hello", "hello"]}]
)
options = st.fixed_dictionaries(
    # without penalties that reward repetition, a random model repeats nothing, and nothing would be accepted
    {"temperature": st.sampled_from([0, 0, 0.4, 1.0]), "max_tokens": st.integers(1, 40), "seed": st.integers(0, 9)},
    optional={
        "n": st.integers(1, 3),
        "top_k": st.sampled_from([1, 5]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.just(0.1),
        "min_tokens": st.integers(0, 1),
        "stop": st.sampled_from([["a"], ["zz", "Q"], ["bc"]]),
        "bad_words": st.just(["ab", "x"]),
        "stop_token_ids": st.just(encode("kq")),
        "allowed_token_ids": st.just([*encode("abchelo {}':1"), EOS]),
        "logit_bias": st.just({encode("b")[0]: 3.0}),
        "logprobs": st.sampled_from([0, 2]),
        "prompt_logprobs": st.just(1),
        "repetition_penalty": st.sampled_from([0.7, 1.2]),
        "presence_penalty": st.just(-2),
        "frequency_penalty": st.just(-1),
        "ignore_eos": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "structured_outputs": structures,
    },
)
batches = st.lists(st.tuples(st.sampled_from(TEXTS), options), min_size=1, max_size=5)


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


def plain(output):
    return [(each.token_ids, each.text, each.finish_reason, each.stop_reason) for each in output.outputs]


def logprobs(output):
    listed = [entry for each in output.outputs for entry in each.logprobs or ()] + (output.prompt_logprobs or [])
    return [{token: scored.logprob for token, scored in entry.items()} for entry in listed if entry is not None]


def check(engine, batch):
    without, with_drafts = complete(engine, batch, False), complete(engine, batch, True)
    for expected, output in zip(without, with_drafts, strict=True):
        assert plain(output) == plain(expected)
        for mine, theirs in zip(logprobs(output), logprobs(expected), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)
        for mine, theirs in zip(output.outputs, expected.outputs, strict=True):
            assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-2)


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


@pytest.mark.thorough
def test_hundreds_of_aborts_return_all_blocks(engines):
    source = random.Random(2)
    for engine in (engines(1, "suffix", 5), engines(2, "suffix", "auto")):
        for _ in range(60):
            complete(engine, REPEATING, True, abort=source)


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
