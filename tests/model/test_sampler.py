import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import V, one, random_logits, row, token_lists
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from ulysses_infer.model.sampling import sampler as sampler_module
from ulysses_infer.model.sampling.columns import WholeRows
from ulysses_infer.model.sampling.processors import apply_processors
from ulysses_infer.model.sampling.row import SamplingRow, needs_full_logits
from ulysses_infer.model.sampling.sampler import NO_TOKEN, Sampler
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.bad_words import BadWords

# --- greedy ---


def test_greedy_takes_the_largest_logit_and_the_lowest_id_on_ties():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert Sampler().sample(logits, [row(temperature=0), row(temperature=0)]) == [1, 0]
    with_processors = [row(temperature=0, logit_bias={3: 1.0}) for _ in range(2)]
    assert Sampler().sample(logits, with_processors) == [1, 3]


def test_plain_greedy_rows_cost_one_argmax(monkeypatch):
    monkeypatch.setattr(sampler_module, "apply_processors", None)
    monkeypatch.setattr(sampler_module, "draw", None)
    logits = random_logits(5, V)
    assert Sampler().sample(logits, [row(temperature=0)] * 5) == logits.argmax(-1).tolist()


def test_logits_are_not_modified():
    logits = random_logits(3, V)
    before = logits.clone()
    rows = [
        row(temperature=0, repetition_penalty=2.0),
        row(top_p=0.5, allowed_token_ids=[1, 2]),
        row(bad_words=[[4]], logit_bias={3: 50.0}),
    ]
    Sampler().sample(logits, rows)
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens():
    assert Sampler().sample(torch.empty(0, V), []) == []


def test_greedy_rows_and_temperature_near_zero_agree():
    logits = random_logits(50, V)
    cold = [row(temperature=1e-4, seed=index) for index in range(50)]
    assert Sampler().sample(logits, cold) == logits.argmax(-1).tolist()


# --- processors, against straightforward references ---


def apply_to(scores: torch.Tensor, rows: list[SamplingRow]) -> None:
    apply_processors(scores, rows, [each.constraints() for each in rows], WholeRows(V))


def processed(logits: torch.Tensor, sampling_row: SamplingRow) -> torch.Tensor:
    scores = logits[None].clone()
    apply_to(scores, [sampling_row])
    return scores[0]


def reference_penalties(logits, prompt, outputs, repetition, presence, frequency):
    scores = logits.tolist()
    for token in range(len(scores)):
        if token in prompt or token in outputs:
            scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
        count = list(outputs).count(token)
        scores[token] -= frequency * count + presence * (count > 0)
    return torch.tensor(scores)


@settings(deadline=None)
@given(
    prompt=token_lists,
    outputs=token_lists,
    repetition=st.floats(0.1, 3),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
def test_penalties_equal_their_definition(prompt, outputs, repetition, presence, frequency, seed):
    logits = random_logits(V, seed=seed)
    penalised = row(
        prompt,
        outputs,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    expected = reference_penalties(logits, prompt, outputs, repetition, presence, frequency)
    torch.testing.assert_close(processed(logits, penalised), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits = random_logits(V)
    prompt, outputs = [1, 2, 2, 7], [9, 9, 30]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + outputs]), logits[None].clone())
    actual = processed(logits, row(prompt, outputs, repetition_penalty=penalty))
    torch.testing.assert_close(actual, expected[0])


def test_penalties_follow_outputs_that_grow():
    logits, outputs = random_logits(V), [4]
    growing = SamplingRow(SamplingParams(frequency_penalty=1.0, repetition_penalty=1.5), 0, [1], outputs)
    for token in (4, 8, 8, 1):
        fresh = row([1], outputs, frequency_penalty=1.0, repetition_penalty=1.5)
        assert torch.equal(processed(logits, growing), processed(logits, fresh))
        outputs.append(token)


def test_penalties_do_not_change_other_rows():
    logits = random_logits(3, V)
    rows = [row(), row(repetition_penalty=1.7, presence_penalty=1.0), row()]
    scores = logits.clone()
    apply_to(scores, rows)
    assert torch.equal(scores[[0, 2]], logits[[0, 2]])
    assert not torch.equal(scores[1], logits[1])


def test_logit_bias_is_added():
    logits = random_logits(V)
    expected = logits.clone()
    expected[3] += 5
    expected[7] -= 100
    torch.testing.assert_close(processed(logits, row(logit_bias={3: 5, 7: -100})), expected)


def test_only_allowed_tokens_are_sampled():
    logits = random_logits(300, V)
    drawn = Sampler().sample(logits, [row(seed=seed, allowed_token_ids=[5, 11]) for seed in range(300)])
    assert set(drawn) == {5, 11}


def test_bad_words_forbid_their_last_token_after_the_rest():
    logits = torch.zeros(V)
    logits[7] = 10.0
    words = [[7], [5, 6, 8]]
    assert processed(logits, row(bad_words=words))[7] == -math.inf
    assert processed(logits, row(outputs=[5, 6], bad_words=words))[8] == -math.inf
    assert processed(logits, row(outputs=[6, 6], bad_words=words))[8] == 0
    assert processed(logits, row(prompt=[5], outputs=[6], bad_words=words))[8] == 0  # output only, as in vLLM
    params = SamplingParams(temperature=0, bad_words=["seven"])
    assert one(logits, SamplingRow(params, 0, [], [], bad_words=BadWords(words))) == 0


def test_min_tokens_forbid_eos_and_stop_tokens():
    logits = torch.zeros(V)
    logits[2], logits[9], logits[4] = 9.0, 8.0, 7.0
    held = {"eos": frozenset({2}), "temperature": 0, "min_tokens": 2, "stop_token_ids": [9]}
    assert one(logits, row(**held)) == 4
    assert one(logits, row(outputs=[1], **held)) == 4
    assert one(logits, row(outputs=[1, 1], **held)) == 2


def test_allowed_tokens_come_before_bias_and_penalties():
    logits = torch.zeros(V)
    logits[:3] = torch.tensor([3.0, 2.0, 1.0])
    limited = row([0], temperature=0, allowed_token_ids=[1, 2], logit_bias={2: 2.0, 5: 100.0}, repetition_penalty=2)
    assert one(logits, limited) == 2


# --- rows that cannot be sampled ---


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nonfinite_row_gives_no_token_and_does_not_affect_other_rows(temperature):
    logits = random_logits(5, V)
    logits[1, 3] = math.nan
    logits[3, 5] = math.inf
    rows = [row(seed=index, temperature=temperature) for index in range(5)]
    drawn = Sampler().sample(logits, rows)
    assert drawn[1] == drawn[3] == NO_TOKEN
    for index in (0, 2, 4):
        assert drawn[index] == one(logits[index], rows[index])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_with_every_token_forbidden_gives_no_token(temperature):
    impossible = row(temperature=temperature, allowed_token_ids=[2], min_tokens=1, eos=frozenset({2}), top_p=0.5)
    assert one(random_logits(V), impossible) == NO_TOKEN


# --- what needs the whole vocabulary ---


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": ["x"]},
        {"min_tokens": 1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
    ],
)
def test_rows_with_processors_or_randomness_need_full_logits(params):
    assert needs_full_logits(SamplingParams(**{"temperature": 0, **params}))


def test_plain_greedy_rows_do_not_need_full_logits():
    assert not needs_full_logits(SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.2, seed=1, stop=["x"]))
