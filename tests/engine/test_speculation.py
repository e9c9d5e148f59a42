"""Proposers, the choice of the number of drafted tokens, and rows after drafted tokens."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.config import PolicyConfig, SpeculationConfig
from ulysses_infer.engine.batch import Batch, ScheduledRequest
from ulysses_infer.engine.policies import AdaptivePolicy, StaticPolicy, ThresholdPolicy
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.acceptance import Acceptance
from ulysses_infer.engine.speculation.draft_planner import DraftPlanner, Prediction
from ulysses_infer.engine.speculation.ngram import NgramProposer
from ulysses_infer.engine.speculation.proposer import NOTHING, Draft, Query
from ulysses_infer.engine.speculation.speculation import Speculation
from ulysses_infer.engine.speculation.step_times import StepTimes
from ulysses_infer.engine.speculation.suffix import SharedOutputs, SuffixProposer
from ulysses_infer.engine.speculation.token_index import SEPARATOR, TokenIndex
from ulysses_infer.model.sampling.drafted import rows_after
from ulysses_infer.model.sampling.draw import draw_unless_accepted
from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.model.sampling.sampler import Sampler
from ulysses_infer.model.sampling.seeds import acceptance_number, uniform
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.step_time.step_shape import StepShape

tokens = st.lists(st.integers(0, 3), max_size=40)


def request(prompt, output=(), index=0, salt=""):
    made = Request(f"r{index}", index, list(prompt), SamplingParams(max_tokens=99), 0.0, cache_salt=salt)
    made.output_token_ids += output
    return made


def ask(proposer, of, most=8, first=()):
    (draft,) = proposer.propose([Query(of, tuple(first), most)])
    return draft


# --- proposers ---


def longest_match(text, tail, least):
    """(places, length) by the definition: where the longest end of `tail` that occurs is followed by a token."""
    for length in range(len(tail), least - 1, -1):
        end = tail[-length:]
        places = [p for p in range(length, len(text)) if text[p - length : p] == end and SEPARATOR not in end]
        if places:
            return places, length
    return None


@given(text=tokens, tail=st.lists(st.integers(0, 3), max_size=6), cuts=st.lists(st.integers(0, 40), max_size=3))
@settings(max_examples=200, deadline=None)
def test_the_index_finds_every_place_of_the_longest_match(text, tail, cuts):
    index, start = TokenIndex(), 0
    for cut in [*sorted(cuts), len(text)]:
        index.extend(text[start:cut])
        start = max(start, cut)
    match = index.find(np.array(tail, dtype=np.int64), 2)
    expected = longest_match(text, tail, 2)
    assert (match and (match.places.tolist(), match.length)) == expected


def test_ngram_continues_the_latest_occurrence_of_the_longest_match():
    text = [1, 2, 3, 9, 5, 2, 3, 8, 7, 1, 2, 3]
    assert ask(NgramProposer(2, 3), request(text), most=3).tokens == (9, 5, 2)
    assert ask(NgramProposer(2, 2), request(text), most=3).tokens == (8, 7, 1)
    assert ask(NgramProposer(2, 3), request([1, 2, 3, 4])) == NOTHING


def test_a_text_that_repeats_itself_is_continued_beyond_its_end():
    assert ask(NgramProposer(2, 4), request([7, 1, 2, 3, 1, 2], [3]), most=7).tokens == (1, 2, 3, 1, 2, 3, 1)


def test_ngram_follows_a_growing_output_and_forced_tokens():
    proposer, growing = NgramProposer(2, 4), request([1, 2, 3, 4, 5])
    assert ask(proposer, growing) == NOTHING
    growing.output_token_ids += [2, 3]
    assert ask(proposer, growing, most=2).tokens == (4, 5)
    assert ask(proposer, growing, most=1, first=[4]).tokens == (5,)
    proposer.forget(growing)
    assert ask(proposer, request([9, 9], index=0)) == NOTHING


def test_suffix_proposes_the_most_frequent_continuation_with_its_share():
    text = [1, 2, 5, 6, 1, 2, 5, 7, 1, 2, 4, 0, 1, 2]
    draft = ask(SuffixProposer(2, 8, None), request(text), most=2)
    assert draft.tokens == (5, 7), "5 follows twice of three times; of its equally frequent continuations, the latest"
    assert draft.confidences == pytest.approx((2 / 3, 1 / 2))


def test_suffix_shares_outputs_only_with_requests_of_the_same_salt():
    proposer = SuffixProposer(2, 8, max_shared_tokens=100)
    ended = request([9], [1, 2, 3, 4], index=1, salt="a")
    proposer.forget(ended)
    assert ask(proposer, request([8, 1, 2], index=2, salt="a")).tokens == (3, 4)
    assert ask(proposer, request([8, 1, 2], index=3, salt="b")) == NOTHING
    alone = SuffixProposer(2, 8, max_shared_tokens=None)
    alone.forget(ended)
    assert ask(alone, request([8, 1, 2], index=4, salt="a")) == NOTHING


def test_a_proposal_never_crosses_from_one_output_to_the_next():
    proposer = SuffixProposer(2, 8, max_shared_tokens=100)
    for index, output in enumerate([[1, 2, 3], [4, 5, 6]]):
        proposer.forget(request([0], output, index=index))
    assert ask(proposer, request([1, 2], index=9)).tokens == (3,)


def test_shared_outputs_are_bounded_and_keep_the_latest():
    shared = SharedOutputs(max_tokens=50)
    for number in range(100):
        shared.add([number, number + 1, number + 2])
        assert len(shared.index) <= 50 + 4
    assert shared.index.find(np.array([99, 100]), 2) is not None
    assert shared.index.find(np.array([5, 6]), 2) is None


# --- how much is drafted ---


def test_acceptance_follows_what_was_accepted_and_recovers_when_unused():
    good, bad = Acceptance(), Acceptance()
    for _ in range(30):
        good.observe([1.0] * 4, 4)
        bad.observe([1.0] * 4, 0)
    assert good.rate > 0.97
    assert bad.rate < 0.06
    assert good.gains([1.0, 0.5]) == pytest.approx([good.rate, good.rate * good.rate * 0.5])
    before = bad.rate
    bad.skip(400)
    assert before < bad.rate < 0.7


def planner(seconds_of_rows):
    return DraftPlanner(lambda shape: Prediction(Mode(1, 1), seconds_of_rows(shape.num_tokens), True))


def test_cheap_rows_are_drafted_and_dear_ones_are_not():
    gains, contexts = {7: [0.9, 0.8, 0.7]}, {7: 100}
    assert planner(lambda rows: 1.0).plan(gains, contexts, [], 99).counts == {7: 3}
    assert planner(lambda rows: float(rows)).plan(gains, contexts, [], 99).counts == {}
    assert planner(lambda rows: 1.0).plan(gains, contexts, [], 2).counts == {7: 2}


def test_under_load_the_number_of_drafted_tokens_goes_to_zero():
    def seconds(rows):  # flat while weights are read, then proportional to the rows
        return max(1.0, rows / 16)

    drafted = []
    for running in (1, 4, 8, 16, 64):
        gains = {index: [0.6, 0.4, 0.2] for index in range(running)}
        plan = planner(seconds).plan(gains, dict.fromkeys(gains, 50), [], 999)
        drafted.append(sum(plan.counts.values()) / running)
    assert drafted[0] == 3
    assert drafted[-1] == drafted[-2] == 0
    assert drafted == sorted(drafted, reverse=True)


def test_with_a_target_the_mean_time_per_token_counts():
    gains = {1: [0.95, 0.9, 0.85, 0.8], 2: [0.6, 0.3]}
    contexts = {1: 10, 2: 10}

    def seconds(shape):
        return Prediction(Mode(1, 1), max(1.0, shape.num_tokens / 5), True)

    fast = DraftPlanner(seconds).plan(gains, contexts, [], 99)
    fair = DraftPlanner(seconds, lambda: True).plan(gains, contexts, [], 99)
    assert fast.counts == {1: 3}, "three more rows are free, and these bring most tokens"
    assert fair.counts == {1: 2, 2: 1}, "the first token of the slow request brings its time per token down most"
    assert "for each request" in fair.reason

    def mean_tpot(counts):
        return sum(1 / (1 + sum(gains[index][: counts.get(index, 0)])) for index in gains) / len(gains)

    others = [{1: first, 2: 3 - first} for first in range(1, 4)]
    assert mean_tpot(fair.counts) == min(map(mean_tpot, others))


def test_step_times_ask_the_policy_for_its_target():
    policies = [AdaptivePolicy([Mode(1, 1)], PolicyConfig(target_tpot_ms=target)) for target in (None, 30.0)]
    threshold = ThresholdPolicy(Mode(2, 1), Mode(1, 2), 8)
    aims = [StepTimes([Mode(1, 1)], [], lambda policy=each: policy).aims_at_tpot for each in (*policies, threshold)]
    assert aims == [False, True, False]


def test_the_threshold_counts_drafted_tokens():
    modes = [Mode(2, 1), Mode(1, 2)]
    times = StepTimes(modes, [], lambda: ThresholdPolicy(*modes, threshold_tokens=8))
    assert times.predict(StepShape.of([50] * 8, [])).mode == Mode(1, 2)
    assert times.predict(StepShape.of([50] * 9, [])).mode == Mode(2, 1)


def test_steps_with_drafts_have_few_sizes():
    """Each size is recorded or captured before it is replayed."""
    sizes = set()
    for running in range(1, 33):
        for offered in range(8):
            gains = {index: [0.9] * offered for index in range(running)}
            plan = planner(lambda rows: 1.0).plan(gains, dict.fromkeys(gains, 9), [], 999)
            sizes.add(running + sum(plan.counts.values()))
    assert len(sizes) < 60
    few = {1: [0.9], 2: [0.9]}
    plan = planner(lambda rows: 1.0).plan(few, dict.fromkeys(range(17), 9), [], 999)
    assert plan.counts == {1: 1, 2: 1}, "too few for the next size, 20"


def test_likely_tokens_come_before_unlikely_ones_of_other_requests():
    plan = planner(lambda rows: max(1.0, rows / 5)).plan({1: [0.1, 0.05], 2: [0.9, 0.8, 0.7]}, {1: 10, 2: 10}, [], 99)
    assert plan.counts == {2: 3}
    assert "3 of 5 proposed tokens" in plan.reason


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_the_plan_is_the_best_of_all_numbers_of_tokens(seed):
    source = random.Random(seed)
    gains = {
        index: np.cumprod([source.random() for _ in range(source.randint(0, 4))]).tolist()
        for index in range(source.randint(1, 3))
    }
    cost = source.random() * 0.5

    def seconds(rows):
        return 1 + cost * rows

    counts = planner(seconds).plan(gains, dict.fromkeys(gains, 9), [], 999).counts
    ordered = sorted((gain for each in gains.values() for gain in each), reverse=True)
    speeds = [(len(gains) + sum(ordered[:n])) / seconds(len(gains) + n) for n in range(len(ordered) + 1)]
    chosen = sum(counts.values())
    got = len(gains) + sum(sum(gains[index][:count]) for index, count in counts.items())
    assert got / seconds(len(gains) + chosen) >= max(speeds) * (1 - 1e-9) or len(gains) + len(ordered) > 8


# --- when tokens are proposed ---


class FlatTimes(StepTimes):
    """Every step takes a second."""

    def __init__(self):
        super().__init__([Mode(1, 1)], [], lambda: StaticPolicy(Mode(1, 1)))

    def predict(self, shape):
        return Prediction(Mode(1, 1), 1.0, True)


def make_speculation(**changes):
    return Speculation(SpeculationConfig(method="ngram"), lambda request: None, FlatTimes(), 64, **changes)


def decoding(tokens, index=0):
    """A request that has computed all but its last token."""
    made = request(tokens[:-1], tokens[-1:], index)
    made.length_limit = made.num_tokens + 90
    made.num_computed_tokens = made.num_tokens - 1
    return made


def run_step(speculation, running, right=99):
    """(drafted tokens by request) of a step that accepts at most `right` of each."""
    drafts = speculation.draft(running, None)
    scheduled = [
        ScheduledRequest(each, each.num_computed_tokens, 1 + len(tokens), [], True, drafts=tokens)
        for each in running
        if (tokens := drafts.get(each.index, ()))
    ]
    accepted = {item.request.index: min(right, len(item.drafts)) for item in scheduled}
    speculation.observe(Batch(scheduled, []), accepted)
    return drafts


@pytest.mark.parametrize(
    ("runs_ahead", "tried"), [(False, [True, False] * 6), (True, [True, False, True] + [False] * 3)]
)
def test_a_request_pauses_longer_where_steps_are_launched_ahead(runs_ahead, tried):
    speculation, made = make_speculation(runs_ahead=runs_ahead), decoding([1, 2, 3, 4])
    asked = []
    speculation._proposer.propose = lambda queries: asked.append(speculation._step) or [NOTHING for _ in queries]
    for _ in tried:
        run_step(speculation, [made])
    assert [step in asked for step in range(len(tried))] == tried


def test_a_request_that_gets_few_tokens_is_offered_few():
    speculation, made = make_speculation(), decoding([1, 2, 3] * 5)
    sizes = [len(run_step(speculation, [made], right=0).get(0, ())) for _ in range(6)]
    assert sizes[0] == 15, "16 rows with the known token: a size of steps that recurs"
    assert sizes == sorted(sizes, reverse=True)
    asked = []
    speculation._proposer.propose = lambda queries: asked.extend(queries) or [NOTHING for _ in queries]
    run_step(speculation, [made])
    assert asked[0].most <= 2 * sizes[-1] + 2


def test_new_requests_start_from_what_was_accepted_of_others():
    good, bad = make_speculation(), make_speculation()
    for speculation, right in ((good, 99), (bad, 0)):
        for _ in range(9):
            run_step(speculation, [decoding([1, 2, 3] * 5)], right)
    rates = [each._of(decoding([1, 2, 3], index=7)).acceptance.rate for each in (good, bad)]
    assert rates[0] > 0.95
    assert 0.2 < rates[1] < 0.5, "it is tried all the same"


def test_without_drafts_what_was_rejected_is_forgotten():
    speculation, made = make_speculation(), decoding([1, 2, 3] * 5)
    for _ in range(9):
        run_step(speculation, [made], right=0)
    before = speculation._of(made).acceptance.rate
    speculation._proposer.propose = lambda queries: [NOTHING for _ in queries]
    for _ in range(300):
        run_step(speculation, [made])
    assert speculation._of(made).acceptance.rate > before + 0.2


class UnlikelyModel:
    """A proposer that takes time, a tenth of a step per token, and whose tokens have a chance of a tenth."""

    is_gradual = False

    def __init__(self):
        self.asked = 0

    def propose(self, queries):
        self.asked += any(query.most for query in queries)
        return [Draft((5,) * query.most, (0.1,) * query.most) for query in queries]

    def draft_seconds(self, requests, count):
        return 0.1 * count

    def forget(self, request):
        pass

    def reset(self):
        pass


class CostlyRows(FlatTimes):
    """Each row takes half a second."""

    def predict(self, shape):
        return Prediction(Mode(1, 1), 0.5 + 0.5 * shape.num_tokens, True)


def test_drafting_ends_though_its_unlikely_tokens_are_never_verified():
    proposer = UnlikelyModel()
    config = SpeculationConfig(method="draft_model", model="-")
    speculation = Speculation(config, lambda request: None, CostlyRows(), 64, proposer)
    for index in range(200):
        assert run_step(speculation, [decoding([1, 2, 3], index)]) == {}
    assert 1 <= proposer.asked <= 10


# --- rows after drafted tokens ---

options = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 1.5])},
    optional={
        "presence_penalty": st.just(1.5),
        "frequency_penalty": st.just(-0.7),
        "repetition_penalty": st.just(1.4),
        "min_tokens": st.integers(0, 6),
        "logit_bias": st.just({3: 2.0}),
        "top_p": st.just(0.8),
        "top_k": st.just(5),
    },
)


@given(chosen=options, drafts=st.lists(st.integers(0, 11), max_size=5), output=st.lists(st.integers(0, 11), max_size=4))
@settings(max_examples=60, deadline=None)
def test_rows_after_drafts_choose_what_a_row_with_these_outputs_chooses(chosen, drafts, output):
    params = SamplingParams(max_tokens=50, **chosen)
    prompt, eos = [1, 1, 5], frozenset({2})
    logits = torch.randn(len(drafts) + 1, 12, generator=torch.Generator().manual_seed(len(output)))
    together = Sampler().sample(logits, list(rows_after(SamplingRow(params, 9, prompt, output, eos), drafts)))
    alone = [
        Sampler().sample(logits[n : n + 1], [SamplingRow(params, 9, prompt, output + drafts[:n], eos)])[0]
        for n in range(len(drafts) + 1)
    ]
    assert together == alone


# --- rejection sampling ---


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    kept = expected > 0
    return float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())


@pytest.mark.parametrize("draft", [0, 2, 5])
def test_rejection_sampling_has_the_distribution_of_the_model(draft):
    number, vocab_size = 100_000, 6
    params = SamplingParams(temperature=0.8, top_k=5)
    scores = torch.tensor([1.0, 0.3, -0.5, 0.9, -1.5, 0.1])
    probabilities = (scores / 0.8).softmax(0)
    probabilities[scores.argmin()] = 0  # top_k
    probabilities = (probabilities / probabilities.sum()).double().numpy()
    chosen = draw_unless_accepted(
        scores.repeat(number, 1),
        scores.max().repeat(number),
        [params] * number,
        [uniform(seed, 3) for seed in range(number)],
        [draft] * number,
        [acceptance_number(seed, 3) for seed in range(number)],
    )
    counts = np.bincount(chosen.numpy(), minlength=vocab_size)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square(counts, probabilities) < 23.5, "4 degrees of freedom, p = 1e-4"


def test_a_draft_that_the_parameters_exclude_is_never_accepted():
    params = SamplingParams(temperature=1.0, top_k=1)
    scores = torch.tensor([[0.0, 3.0, 1.0]])
    for seed in range(50):
        chosen = draw_unless_accepted(
            scores, torch.tensor([3.0]), [params], [uniform(seed, 0)], [2], [acceptance_number(seed, 0)]
        )
        assert chosen.tolist() == [1]
