"""Drafts of a smaller model change no output, whatever they are; its cache follows the requests.

The draft model is the served model itself, whose drafts are all right, or a random one, whose drafts are all wrong.
"""

import functools
import json
import random

import hypothesis
import numpy as np
import pytest
import torch

from docs.generate.tiny_configs import tiny_configs
from tests.distributed.test_speculation_modes import REPEATING, TEXTS, batches, check, complete
from tests.equivalence.tiny_models import make_checkpoint
from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.engine.speculation.proposer import Query
from ulysses_infer.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of one layer whose heads do not divide over two ranks."""
    made = tmp_path_factory.mktemp("other")
    torch.manual_seed(5)
    tiny_llama(made, num_hidden_layers=1, hidden_size=24, num_attention_heads=3, num_key_value_heads=1)
    return str(made)


def chosen(folder, draft, sp=1, tp=1, **changes):
    """Few blocks, so that requests are preempted, and steps that are shorter than prompts."""
    plain = {"cache.num_blocks": 45, "scheduler.max_num_batched_tokens": 24, "speculation.num_tokens": 4}
    drafting = {"speculation.method": "draft_model", "speculation.model": draft}
    return settings(sp, tp, **plain | drafting | changes)


def flip_modes(inference, seed=0):
    """Every step of either model runs in a mode of its own."""
    draw, modes = random.Random(seed), inference.config.parallel.available_modes
    engine = inference._engine
    engine.choose_mode = lambda _: draw.choice(modes)
    own = list(engine.worker.drafter.worker.groups.by_mode)
    proposer_of(engine).choose_mode = lambda _: draw.choice(own)
    return engine


def proposer_of(engine):
    return engine.speculation._proposer


@functools.cache
def engine_of(folder, draft, **changes):
    return init_inference(folder, **chosen(folder, draft, **changes))


@pytest.fixture(scope="module")
def engines():
    started = []

    def start(*arguments, **changes):
        inference = engine_of(*arguments, **changes)
        if inference not in started:
            started.append(inference)
            flip_modes(inference)
        engine = inference._engine
        engine.speculation.reset_stats()
        return engine

    yield start
    for inference in started:
        proposer_of(inference._engine).texts.assert_idle()
        inference.shutdown()
    engine_of.cache_clear()


def plain_batch(temperature=0.0, count=40):
    return [
        (text, {"max_tokens": count, "temperature": temperature, "seed": 3, "ignore_eos": True})
        for text in [*TEXTS, "a long prompt, which takes the draft model several steps of its own"]
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_all_drafts_of_the_model_itself_are_accepted(engines, folder, temperature):
    engine = engines(folder, folder)
    check(engine, plain_batch(temperature))
    stats = engine.speculation.stats
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 30


def test_wrong_drafts_change_nothing(engines, folder, other):
    engine = engines(folder, other)
    check(engine, [*plain_batch(), *REPEATING])
    stats = engine.speculation.stats
    assert stats.num_draft_tokens > 100
    assert stats.num_accepted_tokens < 0.2 * stats.num_draft_tokens


@hypothesis.settings(max_examples=3, deadline=None)
@hypothesis.given(batch=batches)
def test_any_options_give_the_outputs_without(engines, folder, batch):
    check(engines(folder, folder), batch)


@pytest.mark.thorough
@pytest.mark.parametrize("perfect", [True, False])
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(batch=batches)
def test_many_options_give_the_outputs_without(engines, folder, other, perfect, batch):
    check(engines(folder, folder if perfect else other, **{"speculation.num_tokens": "auto"}), batch)


def test_aborts_return_the_blocks_of_both_caches(engines, folder):
    source, engine = random.Random(1), engines(folder, folder)
    for _ in range(4):
        complete(engine, REPEATING, True, abort=source)
        proposer_of(engine).texts.assert_idle()


def test_a_prompt_that_was_drafted_for_before_is_not_computed_again(engines, folder):
    engine, computed = engines(folder, folder), []
    drafter = engine.worker.drafter
    step = drafter.step
    drafter.step = lambda plan, choose: computed.append(plan.num_tokens) or step(plan, choose)
    for _ in range(2):
        computed.append(0)
        complete(engine, [("the quick brown fox jumps over it", {"temperature": 0, "max_tokens": 6})], True)
    drafter.step = step
    second = computed[computed.index(0, 1) :]
    assert max(computed) > 20
    assert max(second) < 6


def test_steps_are_recorded_and_can_be_launched_before_their_tokens_are_known(engines, folder):
    engine = engines(folder, folder)
    proposer, graphs = proposer_of(engine), engine.worker.drafter.worker.graphs
    replayed, run = [], graphs.run
    graphs.run = lambda step, finish: replayed.append(step.plan.has_placeholders) or run(step, finish)
    proposer._chained = True
    try:
        for _ in range(2):
            check(engine, plain_batch(0.9)[:2])
        stats = engine.speculation.stats
        assert stats.num_accepted_tokens == stats.num_draft_tokens > 50
        assert sum(replayed) > 20
    finally:
        proposer._chained, graphs.run = False, run


def test_drafting_ends_where_the_next_token_is_not_worth_its_time(engines, folder, other):
    engine = engines(folder, other)
    name = engine.add(TEXTS[0], SamplingParams(temperature=0, max_tokens=40, speculation=False))
    engine.step()
    (request,) = engine.scheduler.running
    whole, none, part = (
        proposer_of(engine).propose([Query(request, (), 8, rate=1.1, least=least)])[0]
        for least in ((), (0.99,) * 8, (0.01,) * 8)
    )
    engine.abort(name)
    chances = np.cumprod([min(1, 1.1 * confidence) for confidence in whole.confidences])
    assert len(whole.tokens) == 8
    assert len(none.tokens) == 1
    assert part == whole.upto(1 + int((chances > 0.01).sum()))


def test_rejection_sampling_accepts_what_the_model_itself_draws(engines, folder):
    engine = engines(folder, folder, **{"speculation.acceptance": "rejection"})
    check(engine, plain_batch(0.0)[:2])
    engine.speculation.reset_stats()
    outputs = complete(engine, plain_batch(1.0), True)
    assert [len(each.outputs[0].token_ids) for each in outputs] == [40] * len(outputs)
    stats = engine.speculation.stats
    assert stats.num_draft_tokens - stats.num_accepted_tokens <= 2 < stats.num_accepted_tokens  # rounding


def test_the_number_of_tokens_goes_to_zero_for_a_draft_that_is_never_right(folder, other):
    with init_inference(folder, **chosen(folder, other, **{"speculation.num_tokens": "auto"})) as inference:
        engine = flip_modes(inference)
        complete(engine, plain_batch(count=60), True)
        stats = engine.speculation.stats
        assert stats.num_draft_tokens < 0.5 * 6 * 60


def test_after_sleep_the_cache_of_the_draft_model_starts_anew(engines, folder):
    inference, engine = engine_of(folder, folder), engines(folder, folder)
    inference.sleep()
    inference.wake_up()
    check(engine, plain_batch()[:2])
    stats = engine.speculation.stats
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 50


# --- several ranks ---


def outputs_and_stats(folder, draft, sp, tp, changes):
    """(outputs without drafts, with drafts, drafted and accepted tokens) in modes that flip."""
    params = [
        SamplingParams(temperature=0.8 * (n % 2), seed=n, max_tokens=30, ignore_eos=True) for n in range(len(TEXTS))
    ]
    with init_inference(folder, **chosen(folder, draft, sp, tp, **changes)) as inference:
        if inference.is_first:
            flip_modes(inference)
        found = []
        for drafts in (False, True):
            wanted = [each.clone(speculation=drafts) for each in params]
            found.append([output.outputs[0].token_ids for output in inference.generate(TEXTS, wanted)])
        stats = inference.stats()
        if inference.is_first:
            proposer_of(inference._engine).texts.assert_idle()
        return *found, stats["spec_decode_num_draft_tokens"], stats["spec_decode_num_accepted_tokens"]


@pytest.mark.parametrize(
    ("sp", "tp", "ranks", "perfect"),
    [
        pytest.param(2, 1, "all", True),
        pytest.param(2, 1, "first", True, marks=pytest.mark.thorough),
        pytest.param(2, 1, "all", False, marks=pytest.mark.thorough),
        pytest.param(2, 2, "all", False, marks=pytest.mark.thorough),
        pytest.param(4, 1, "first", True, marks=pytest.mark.thorough),
    ],
)
def test_all_ranks_draft_together_or_the_first_alone(folder, other, rank_pool, sp, tp, ranks, perfect):
    draft, changes = folder if perfect else other, {"speculation.draft_ranks": ranks}
    for without, drafted, num_drafted, accepted in rank_pool(sp * tp).run(
        outputs_and_stats, folder, draft, sp, tp, changes
    ):
        assert drafted == without
        assert num_drafted > 60
        if perfect:
            assert accepted == num_drafted
        else:
            assert accepted < 0.3 * num_drafted


# --- other kinds of draft models ---


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v3", "llama4_text", "gpt_oss", "qwen3_moe"])
def test_draft_models_of_any_cache_are_followed(family, tmp_path):
    make_checkpoint(next(iter(tiny_configs(family))), tmp_path)
    changes = {"model.max_model_len": 96, "cache.num_blocks": 48}
    with init_inference(str(tmp_path), **{**chosen(str(tmp_path), str(tmp_path)), **changes}) as inference:
        prompts = [[3 + n, 9, 4] * 4 for n in range(4)]
        params = [SamplingParams(temperature=0.7 * (n % 2), seed=n, max_tokens=40, ignore_eos=True) for n in range(4)]
        without, drafted = (
            [o.outputs[0].token_ids for o in inference.generate(prompts, [p.clone(speculation=s) for p in params])]
            for s in (False, True)
        )
        stats = inference.stats()
        proposer_of(inference._engine).texts.assert_idle()
    assert drafted == without
    assert stats["spec_decode_num_accepted_tokens"] > 0.95 * stats["spec_decode_num_draft_tokens"] > 50


# --- bad input ---


@pytest.fixture(scope="module")
def unsuited(tmp_path_factory):
    def make(kind):
        made = tmp_path_factory.mktemp(kind)
        if kind == "smaller":
            tiny_llama(made, tokenizer=False, vocab_size=90)
        elif kind == "other tokens":
            tiny_llama(made)
            file = made / "tokenizer.json"
            content = json.loads(file.read_text(encoding="utf-8"))
            vocabulary = content["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            file.write_text(json.dumps(content), encoding="utf-8")
        elif kind == "recurrent":
            make_checkpoint(next(iter(tiny_configs("qwen3_next"))), made)
        return made if kind != "missing" else made / "none"

    return make


@pytest.mark.parametrize(
    ("kind", "message", "error"),
    [
        ("smaller", "its vocabulary has 90 tokens, that of the served model 99", ConfigError),
        ("other tokens", r"\(99 tokens\).* \(99 tokens\): token 68 is 'b' here and 'a' there", ConfigError),
        pytest.param(
            "recurrent",
            "'qwen3_next' keeps states of recurrent layers",
            ConfigError,
            marks=pytest.mark.thorough,
        ),
        ("missing", "none", CheckpointError),
    ],
)
def test_unsuited_draft_models_are_refused_in_one_line(folder, unsuited, kind, message, error):
    with pytest.raises(error, match=message) as refusal:
        init_inference(folder, **chosen(folder, str(unsuited(kind))))
    assert str(refusal.value).startswith("speculation.model = ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculation.model": None}, "speculation.method = 'draft_model' needs a model"),
        ({"speculation.draft_ranks": "some"}, "choose from all, first"),
        ({"speculation.num_tokens": 24}, "less than scheduler.max_num_batched_tokens = 24"),
        ({"cache.num_blocks": None, "cache.memory_bytes": 1000}, "cache"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(folder, changes, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        init_inference(folder, **{**chosen(folder, folder), **changes})
    assert "\n" not in str(refusal.value)
