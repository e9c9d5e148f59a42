"""Sentencepiece's first space counts alike for the grammar and for the text that the user sees."""

import pytest
import torch

from tests.text.tokenizer_kinds import tokenizer_of
from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.model.sampling.sampler import NO_TOKEN, Sampler
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.detokenizer import Detokenizer
from ulysses_infer.text.first_space import Speller
from ulysses_infer.text.prompts import PromptReader

KIND = "sentencepiece"


def write(wanted, prompt, favourite):
    """The text of a greedy output that prefers one token."""
    tokenizer = tokenizer_of(KIND)
    reader = PromptReader(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}), seed=0)
    params = SamplingParams(temperature=0, structured_outputs=wanted)
    row = SamplingRow(params, 0, prompt, [], reader.eos_token_ids, None, reader.grammar(params, prompt))
    logits = torch.linspace(1, 0, len(tokenizer))[None].clone()
    logits[0, tokenizer.convert_tokens_to_ids(favourite)] = 9
    while len(row.output_token_ids) < 20:
        (token,) = Sampler().sample(logits, [row])
        if token in (NO_TOKEN, tokenizer.eos_token_id):
            break
        row.output_token_ids.append(token)
    detokenizer = Detokenizer(reader.decoder, params, prompt)
    return detokenizer.append(row.output_token_ids) + detokenizer.finish(), row.output_token_ids


@pytest.mark.parametrize("wanted", [{"choice": ["the", "a"]}, {"regex": "the( quick)?"}, {"regex": "(the|tea)+"}])
def test_a_first_token_with_a_space_spells_the_word_without_it(wanted):
    tokenizer = tokenizer_of(KIND)
    text, tokens = write(wanted, [tokenizer.bos_token_id], "▁the")
    assert tokens[0] == tokenizer.convert_tokens_to_ids("▁the")
    assert text.startswith("the")
    text, tokens = write({"choice": [" the"]}, tokenizer.encode("a", add_special_tokens=False)[-1:], "▁the")
    assert (text, len(tokens)) == (" the", 1)


def test_a_space_that_the_grammar_wants_is_seen():
    assert write({"choice": [" a"]}, [tokenizer_of(KIND).bos_token_id], "▁")[0] == " a"


def test_text_is_spelled_in_tokens_or_not_at_all():
    speller = Speller([b"", b"a", b"ab", b"b", b"cd"])
    assert speller.spell(b"abb") == (2, 3)
    assert speller.spell(b"acd") == (1, 4)
    assert speller.spell(b"ac") is None
    assert speller.spell(b"") == ()
