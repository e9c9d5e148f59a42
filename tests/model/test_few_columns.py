"""Rows that allow few tokens: sampling the logits of these alone gives what sampling whole rows gives."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import V, one, random_logits, row, token_lists

from ulysses_infer.model.sampling import draw as draw_module
from ulysses_infer.model.sampling import row as row_module
from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.model.sampling.sampler import NO_TOKEN, Sampler
from ulysses_infer.model.sampling.token_mask import TokenMask

tokens = st.integers(0, V - 1)
token_sets = st.sets(tokens, max_size=12) | st.sets(tokens, min_size=V - 3)


def mask_of(token_ids, vocab_size=V) -> TokenMask:
    mask = TokenMask(None, vocab_size)
    mask.set(sorted(token_ids), True)
    return mask


class Allowing:
    """A grammar that allows the same tokens everywhere."""

    may_end = False

    def __init__(self, token_ids):
        self.token_ids = token_ids

    def mask(self, output_token_ids):
        return mask_of(self.token_ids)


def grammar_row(token_ids, **params) -> SamplingRow:
    made = row(structured_outputs={"regex": "a"}, **params)
    made.grammar = Allowing(token_ids)
    return made


@st.composite
def constrained_rows(draw):
    choose = draw(st.sampled_from(["grammar", "allowed", "both", "neither"]))
    made = row(
        draw(token_lists),
        draw(token_lists),
        draw(st.integers(0, 2**64 - 1)),
        frozenset(draw(st.sets(tokens, max_size=2))),
        [[token] for token in draw(st.sets(tokens, max_size=3))],
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, V])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.7, 0.1])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 0.7, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.5])),
        logit_bias=draw(st.none() | st.dictionaries(tokens, st.floats(-5, 5, width=32), max_size=4)),
        min_tokens=draw(st.sampled_from([0, 6])),
        allowed_token_ids=draw(st.lists(tokens, min_size=1, max_size=9)) if choose in ("allowed", "both") else None,
    )
    if choose in ("grammar", "both"):
        made.grammar = Allowing(draw(token_sets))
        made.has_processors = True
        made.is_plain = False
    return made


def some_logits(count, seed, is_coarse):
    """With ties if coarse, and some tokens that the model itself excludes."""
    logits = random_logits(count, V, seed=seed)
    logits = logits.round() if is_coarse else logits
    logits[:, seed % V] = -math.inf
    return logits


@pytest.mark.parametrize("natively", [True, False], ids=["native", "torch"])
@settings(deadline=None, max_examples=150)
@given(st.lists(constrained_rows(), min_size=1, max_size=6), st.integers(0, 10**6), st.booleans())
def test_tokens_and_scores_equal_those_of_whole_rows(natively, rows, seed, is_coarse):
    logits = some_logits(len(rows), seed, is_coarse)
    of_few, of_whole = logits.clone(), logits.clone()
    # Whether native draws exist depends on the machine; torch's are the same everywhere.
    draws_natively = draw_module.native.draws_natively if natively else lambda weights: False
    with patch.object(draw_module.native, "draws_natively", draws_natively):
        chosen = Sampler().choose(logits, rows, of_few).tolist()
        with patch.object(row_module, "FEW", 0):
            expected = Sampler().choose(logits, rows, of_whole).tolist()
        assert chosen == expected
        assert Sampler().sample(logits, rows) == expected
    possible = [place for place, token in enumerate(expected) if token != NO_TOKEN]
    assert torch.equal(of_few[possible], of_whole[possible])


def test_few_tokens_are_sampled_without_whole_rows(monkeypatch):
    widths = []
    draw = draw_module.draw
    monkeypatch.setattr(
        "ulysses_infer.model.sampling.sampler.draw",
        lambda scores, *others: widths.append(tuple(scores.shape)) or draw(scores, *others),
    )
    logits = random_logits(3, 5000)
    rows = [row(seed=seed, allowed_token_ids=[4000, 7, 12]) for seed in range(3)]
    assert set(Sampler().sample(logits, rows)) <= {7, 12, 4000}
    assert widths == [(3, 16)]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_broken_logits_gives_no_token_even_if_allowed_ones_are_finite(broken, temperature):
    logits = random_logits(2, V)
    logits[1, 30] = broken
    rows = [grammar_row({3, 5}, temperature=temperature) for _ in range(2)]
    first, second = Sampler().sample(logits, rows)
    assert first in (3, 5)
    assert second == NO_TOKEN


def test_a_grammar_that_allows_nothing_gives_no_token():
    assert one(random_logits(V), grammar_row(set())) == NO_TOKEN


class Failing(Allowing):
    def mask(self, output_token_ids):
        raise ValueError("no mask")


@pytest.mark.parametrize("draft", [None, 4])
def test_a_grammar_that_fails_gives_no_token_and_does_not_affect_other_rows(draft):
    failing, other = grammar_row({1}), grammar_row({6})
    failing.grammar, failing.draft = Failing({1}), draft
    assert Sampler().sample(random_logits(2, V), [failing, other]) == [NO_TOKEN, 6]
    assert isinstance(failing.error, ValueError)


@pytest.mark.parametrize("draft", [2, 9])
def test_rejection_sampling_draws_allowed_tokens(draft):
    made = grammar_row({2, 6})
    made.draft = draft
    assert one(random_logits(V), made) in (2, 6)


# --- masks ---


@given(vocab_size=st.integers(1, 70), data=st.data())
def test_masks_say_the_same_in_every_form(vocab_size, data):
    allowed = data.draw(st.sets(st.integers(0, vocab_size - 1)))
    removed = data.draw(st.sets(st.integers(0, vocab_size - 1)))
    given_bits = np.zeros((vocab_size // 32 + 1) * 32, dtype=np.uint8)
    given_bits[sorted(allowed)] = 1
    given_bits[vocab_size:] = 1  # libraries may have more tokens than the model
    mask = TokenMask(np.packbits(given_bits, bitorder="little").tobytes(), vocab_size)
    mask.set(sorted(removed), False)
    left = sorted(allowed - removed)
    assert mask.token_ids().tolist() == left
    assert np.flatnonzero(mask.penalties() == 0).tolist() == left
    assert mask.penalties().shape == (vocab_size,)
    assert np.flatnonzero(mask.contains(np.arange(vocab_size))).tolist() == left
    assert mask.few_token_ids(len(left)).tolist() == left
    assert not left or mask.few_token_ids(len(left) - 1) is None
