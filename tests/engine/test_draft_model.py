"""What the cache of a draft model holds, how much is drafted, which tokens, and how drawn ones are verified."""

import functools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.cache.budget import CPU_CACHE_LIMIT, MemoryBudget
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.paged import CacheShape
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.config import CacheConfig
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.draft_choices import DraftChoices
from ulysses_infer.engine.speculation.draft_planner import GROWTH, DraftPlanner, Prediction
from ulysses_infer.engine.speculation.draft_times import CATCH_UP_STEPS, DraftTimes
from ulysses_infer.engine.speculation.drafted_texts import DraftedTexts
from ulysses_infer.engine.speculation.proposer import Query
from ulysses_infer.errors import ConfigError
from ulysses_infer.job.draft_model import num_draft_blocks
from ulysses_infer.model.sampling.drafted import rows_after
from ulysses_infer.model.sampling.draw import draw_from, draw_unless_source_accepted, masses_of
from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.model.sampling.sampler import Sampler
from ulysses_infer.model.sampling.seeds import acceptance_number, draft_number, uniform
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.step_time.model import Measurement
from ulysses_infer.step_time.step_shape import StepShape
from ulysses_infer.text.same_tokens import check_same_tokens

ONE = Mode(1, 1)


def request(prompt, index=0, output=(), **params):
    made = Request(f"r{index}", index, list(prompt), SamplingParams(max_tokens=99, **params), 0.0)
    made.output_token_ids += output
    return made


# --- the texts in its cache ---


def texts_of(num_blocks=20, max_texts=3, caching=True):
    pools = BlockPools([num_blocks], 4, caching)
    return DraftedTexts(pools, max_texts), pools


def test_a_text_goes_back_to_the_accepted_tokens():
    texts, _ = texts_of()
    asked = request([1, 2, 3, 4, 5], output=[6])
    text = texts.open(asked, {0})
    assert text.num_cached == 0
    assert len(texts.extend(text, 6, {0})) == 2
    texts.computed(text, 6)
    text.ahead = [7, 8, 9]
    asked.output_token_ids += [7, 8, 30, 31]
    assert texts.open(asked, {0}).num_cached == 8
    text.ahead = [30, 31, 32]
    assert texts.open(asked, {0}).num_cached == 9, "the last known token is computed again"
    assert texts.num_missing(asked) == 1


def test_a_text_that_others_have_computed_starts_after_their_blocks():
    texts, pools = texts_of()
    first = texts.open(request(range(1, 12)), {0})
    texts.extend(first, 11, {0})
    texts.computed(first, 11)
    second = texts.open(request(range(1, 12), index=1), {1})
    assert second.num_cached == 8
    assert texts.extend(second, 11, {1})[:2] == first.tables[0][:2]
    texts.forget(first.request)
    texts.forget(second.request)
    texts.assert_idle()
    assert texts.take_dropped() == [0, 1]
    texts.reset()
    assert texts.open(request(range(1, 12), index=2), {2}).num_cached == 0
    texts.forget(request([], index=2))
    assert pools.num_used == 0


@given(seed=st.integers(0, 10**6), caching=st.booleans())
@settings(max_examples=40, deadline=None)
def test_texts_make_room_for_those_in_use_and_return_all_blocks(seed, caching):
    source = random.Random(seed)
    texts, _ = texts_of(12, 3, caching)
    requests = [request([source.randrange(3) for _ in range(source.randint(1, 30))], n) for n in range(6)]
    for _ in range(40):
        asked = source.sample(requests, source.randint(1, 3))
        busy = {each.index for each in asked}
        for each in asked:
            text = texts.open(each, busy)
            assert text is not None, "no more texts are busy than there may be"
            assert 0 <= text.num_cached < each.num_tokens
            if texts.extend(text, each.num_tokens, busy) is not None:
                assert text.num_blocks * 4 >= each.num_tokens
                texts.computed(text, each.num_tokens)
                text.ahead = [source.randrange(3) for _ in range(source.randint(0, 2))]
                each.output_token_ids += [source.randrange(3) for _ in range(source.randint(1, 3))]
        assert len(texts) <= 3
        if source.random() < 0.2:
            texts.forget(source.choice(requests))
    for each in requests:
        texts.forget(each)
    texts.assert_idle()


# --- how much is drafted ---


def planner(seconds_of_rows, aims_at_tpot):
    return DraftPlanner(lambda shape: Prediction(ONE, seconds_of_rows(shape.num_tokens), True), lambda: aims_at_tpot)


@given(seed=st.integers(0, 10**6), aims_at_tpot=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_length_of_drafts_counts_the_time_to_draft_them(seed, aims_at_tpot):
    source = random.Random(seed)
    rates = {index: source.random() for index in range(source.randint(1, 4))}
    cost, each, waiting = source.random() * 0.3, source.random() * 0.5, source.randint(0, 2)
    contexts = dict.fromkeys(range(len(rates) + waiting), 50)

    def speed(count):
        outputs = [1 + sum(rate**n for n in range(1, count + 1)) for rate in rates.values()] + [1] * waiting
        seconds = 1 + cost * (len(contexts) + count * len(rates)) + each * count
        return 1 / (seconds * np.mean(1 / np.array(outputs))) if aims_at_tpot else sum(outputs) / seconds

    length = planner(lambda rows: 1 + cost * rows, aims_at_tpot).best_length(
        rates, contexts, [], 12, lambda count: each * count
    )
    assert speed(length.num_tokens) == pytest.approx(max(map(speed, range(13))))


def test_a_token_is_worth_drafting_if_it_brings_more_than_the_usual_tokens_per_second():
    """One request, tokens that are right with 0.8, 0.1 to draft and 0.1 to verify one more: the best of all lengths."""
    length = planner(lambda rows: 0.9 + 0.1 * rows, False).best_length({1: 0.8}, {1: 50}, [], 16, lambda n: 0.1 * n)
    chances = [0.8**n for n in range(1, 17)]
    speeds = [(1 + sum(chances[:n])) / (1 + 0.2 * n) for n in range(17)]
    assert length.num_tokens == int(np.argmax(speeds))
    assert length.least == pytest.approx((0.2 * max(speeds),) * 16)
    assert chances[length.num_tokens - 1] > length.least[0] > chances[length.num_tokens]


def test_drafts_grow_longer_than_expected_only_where_one_more_token_is_worth_its_time():
    """Rows are computed in tiles of 4: the rest of a tile costs the time to draft it, the next tile more."""
    length = planner(lambda rows: 1 + (rows - 1) // 4, False).best_length({1: 0.7}, {1: 50}, [], 12, lambda n: 0.01 * n)
    assert length.num_tokens == 3
    speed = (1 + 0.7 + 0.7**2 + 0.7**3) / 1.03
    assert length.least[:3] == pytest.approx((0.01 * speed,) * 3)
    assert length.least[3] == pytest.approx(1.04 / 4 * speed), "the next tile has four more"
    assert length.least[4] == pytest.approx(0.01 * speed)


def test_sizes_that_were_never_measured_are_tried_in_steps():
    def predicted(shape):
        return Prediction(ONE, 1.0, shape.num_tokens in measured)  # as if rows cost nothing

    measured, gains, contexts = {2}, {1: [0.99] * 100, 2: [0.99] * 100}, {1: 50, 2: 50}
    for most in (2 * GROWTH, 2 * GROWTH**2):
        planner = DraftPlanner(predicted)
        assert sum(planner.plan(gains, contexts, [], 200).counts.values()) == most - 2
        length = planner.best_length({1: 0.99, 2: 0.99}, contexts, [], 100, lambda n: 0.0)
        assert length.num_tokens == most // 2 - 1
        measured.add(most)


def test_a_text_that_is_caught_up_with_is_spread_over_steps():
    def seconds(shape):
        return 0.01 + 0.001 * shape.num_tokens

    shapes = [StepShape.of([20] * n, []) for n in (1, 2, 4, 8)] + [StepShape.of([], [(0, n)]) for n in (16, 64, 512)]
    times = DraftTimes([ONE], [Measurement(ONE, shape, seconds(shape)) for shape in shapes])
    assert times.of_drafts([20], 0, 3) == pytest.approx(3 * 0.011, rel=0.1)
    more = times.of_drafts([600], 512, 3) - times.of_drafts([600], 0, 3)
    assert more == pytest.approx(0.522 / CATCH_UP_STEPS, rel=0.1)
    assert times.of_drafts([20], 5, 0) == 0
    for _ in range(30):
        times.observe([(ONE, shapes[0])] * 2, 0.2)
    assert times.seconds(shapes[0]) > 0.05


# --- which tokens ---


def test_greedy_requests_draft_the_likeliest_token_with_its_probability():
    asked = [Query(request([1], index, temperature=0), (), 3) for index in range(2)]
    choices = DraftChoices(asked, lambda _: 5, 6, may_replace=False)
    logits = torch.tensor([[0.0, 9.0, 0, 0, 0, 0, 99], [0, 0, 0, 2.0, 0, 0, 0], [4.0, 0, 0, 0, 0, 0, 0]])
    choices.begin([1, None, 0], 0)
    assert choices.choose(0, logits).tolist()[::2] == [1, 0], "row 6 is no token of the served model"
    first, second = choices.confidences()
    assert first == pytest.approx([float(logits[2, :6].softmax(0)[0])])
    assert second == pytest.approx([float(logits[0, :6].softmax(0)[1])])


@given(seed=st.integers(0, 10**6), drafted=st.integers(0, 3), number=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_model_that_drafts_for_itself_draws_the_tokens_that_are_drawn_later(seed, drafted, number):
    asked = request([1], output=[2] * 3, temperature=0.9, top_k=7)
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed))
    choices = DraftChoices([Query(asked, (4,) * drafted, 9)], lambda _: seed, 20, may_replace=False)
    choices.begin([0], number)
    row = SamplingRow(asked.params, seed, [1], [2] * (3 + drafted + number))
    assert choices.choose(0, logits).tolist() == Sampler().sample(logits, [row])


# --- rejection sampling of drawn drafts ---


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    kept = expected > 0
    return float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())


@functools.cache
def numbers(number):
    """The random numbers of position 3 for as many seeds: of the draft, of its acceptance, of what replaces it."""
    return [[stream(seed, 3) for seed in range(number)] for stream in (draft_number, acceptance_number, uniform)]


@pytest.mark.parametrize(
    "drafting",
    [
        pytest.param([1.1, 0.3, -0.2, 0.9, -1.5, 0.0], id="alike", marks=pytest.mark.thorough),
        pytest.param([-9.0, 0.3, 4.0, 0.0, 1.5, 0.1], id="unlike"),
        pytest.param([1.0, 0.3, -0.5, 0.9, -torch.inf, -torch.inf], id="without-endings", marks=pytest.mark.thorough),
    ],
)
def test_drawn_drafts_leave_the_distribution_of_the_model(drafting):
    drafting, scores = torch.tensor(drafting), torch.tensor([1.0, 0.3, -0.5, 0.9, -1.5, 0.1])
    number, params = 100_000, [SamplingParams(temperature=0.8, top_k=5)]
    drafts, accepting, others = numbers(number)
    source = masses_of(drafting[None], drafting.max()[None], params)
    drafted = draw_from(source.expand(number, -1), drafts)
    chosen = draw_unless_source_accepted(
        scores.repeat(number, 1),
        scores.max().repeat(number),
        params * number,
        others,
        drafted.tolist(),
        accepting,
        source.expand(number, -1),
    )
    model = (scores / 0.8).softmax(0)
    model[scores.argmin()] = 0  # top_k
    model = (model / model.sum()).double()
    counts = np.bincount(chosen.numpy(), minlength=6)
    assert counts[4] == 0
    assert chi_square(counts, model.numpy()) < 23.5, "4 degrees of freedom, p = 1e-4"
    accepted = float((chosen == drafted).double().mean())
    expected = float(torch.minimum(model, source[0] / source[0].sum()).sum())
    assert accepted == pytest.approx(expected, abs=0.01), "what replaces a draft is another token"


def test_a_draft_from_the_same_distribution_is_always_accepted():
    logits, params = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)), SamplingParams(top_p=0.7)
    for seed in range(50):
        asked = Request("r", 0, [1], params, 0.0)
        choices = DraftChoices([Query(asked, (), 1)], lambda _, seed=seed: seed, 50, may_replace=True)
        choices.begin([0], 0)
        drafts = choices.choose(0, logits).tolist()
        first, _ = rows_after(SamplingRow(params, seed, [1], []), drafts, True, choices.sources[0])
        assert Sampler().sample(logits, [first]) == drafts


def test_tokens_that_end_an_output_are_never_drawn_as_drafts():
    asked = Request("r", 0, [1], SamplingParams(stop_token_ids=[2]), 0.0, eos_token_ids=frozenset({1}))
    choices = DraftChoices([Query(asked, (), 1)] * 20, lambda _: random.randrange(99), 4, may_replace=True)
    choices.begin(range(20), 0)
    drafts = choices.choose(0, torch.tensor([[0.0, 9.0, 9.0, 0.0]]).repeat(20, 1))
    assert set(drafts.tolist()) <= {0, 3}


# --- whose vocabulary, how much memory ---


class Tokens(dict):
    """A tokenizer that has only a vocabulary."""

    get_vocab = dict.copy


def test_a_different_vocabulary_is_refused_with_both_sizes_and_a_token():
    with pytest.raises(ConfigError, match=r"has 98 tokens, that of the served model 99"):
        check_same_tokens((None, 99), (None, 98))
    own, other = Tokens(a=0, b=1, c=2), Tokens(a=0, c=1)
    with pytest.raises(ConfigError, match=r"\(2 tokens\) .* \(3 tokens\): token 1 is 'c' here and 'b' there"):
        check_same_tokens((own, 3), (other, 3))
    check_same_tokens((own, 8), (Tokens(c=2, a=0, b=1), 4))


def sizing(layers, width):
    shape = CacheShape.uniform(layers, 2, width, width, 4, torch.float32)
    return CacheSizing(shape, CacheGroups.single(layers), 64, 4, 32)


def test_the_draft_model_gets_a_cache_of_as_many_tokens():
    target, draft = sizing(6, 16), sizing(2, 8)
    ratio = target.num_bytes([1]) / draft.num_bytes([1])
    assert ratio == 6
    assert num_draft_blocks(CacheConfig(num_blocks=17), target, draft, 0, True) == 17
    total = 20 * (target.num_bytes([1]) + draft.num_bytes([1]))
    assert num_draft_blocks(CacheConfig(), target, draft, total, False) == 20
    assert num_draft_blocks(CacheConfig(), target, draft, 1 << 50, False) == 64, "all that four requests can use"
    wanted = CacheConfig(memory_bytes=9 * target.num_bytes([1]))
    assert num_draft_blocks(wanted, target, draft, 1 << 50, False) == 9
    assert num_draft_blocks(CacheConfig(), target, draft, 1 << 50, True) * target.num_bytes([1]) <= CPU_CACHE_LIMIT


def test_the_budget_counts_the_draft_model():
    budget = MemoryBudget(10 << 30, 4 << 30, 1 << 30, 2 << 30)
    assert budget.left == 3 << 30
    assert "draft model 2.00 GiB" in str(budget)
