"""Any options with any tokenizer: a request gets a correct answer or a refusal that names the wrong value.

The vocabularies of model and tokenizer differ in size, the modes of two ranks flip, and no request ends the engine.
"""

import functools
import itertools
import json
import random
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.text.tokenizer_kinds import KINDS, tokenizer_of
from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import RequestError
from ulysses_infer.model.sampling.token_mask import TokenMask
from ulysses_infer.outputs import CONSTRAINTS
from ulysses_infer.text.prompts import PromptReader

pytestmark = pytest.mark.distributed
VOCAB_SIZE = 200  # more than some of the tokenizers have, fewer than others
EOS = {2, 150, VOCAB_SIZE, 10**6, -1}
WORDS = ["a", " a", "the", "</s>", "<s>", "é", "你好", "\n", "qu", "ick b", "none"]
REQUESTS = 8  # at most, per batch

token_ids = st.integers(0, 9 * VOCAB_SIZE).map(lambda drawn: drawn % VOCAB_SIZE if drawn else VOCAB_SIZE)
some_words = st.lists(st.sampled_from([*WORDS, *WORDS, "\ud800"]), min_size=1, max_size=3)
structures = st.sampled_from(
    [{"choice": ["aa", " the"]}, {"regex": "[a-c]{1,3}"}, {"json": {"type": "boolean"}}, {"json": {"type": "nonsense"}}]
)
options = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0, 0.7, 2]), "max_tokens": st.integers(1, 10)},
    optional={
        "n": st.integers(1, 3),
        "seed": st.integers(0, 99),
        "top_k": st.sampled_from([1, 5, VOCAB_SIZE + 5]),
        "top_p": st.sampled_from([0.01, 0.9]),
        "min_p": st.just(0.2),
        "min_tokens": st.integers(0, 12),
        "stop": some_words,
        "bad_words": some_words,
        "stop_token_ids": st.lists(token_ids, max_size=3),
        "allowed_token_ids": st.lists(token_ids, max_size=6),
        "logit_bias": st.dictionaries(token_ids, st.sampled_from([-100, -1.5, 100]), max_size=3),
        "logprobs": st.sampled_from([0, 1, 2, 3, -1, VOCAB_SIZE, VOCAB_SIZE + 1]),
        "prompt_logprobs": st.sampled_from([0, 3]),
        "repetition_penalty": st.just(1.3),
        "presence_penalty": st.just(-1),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "structured_outputs": structures,
    },
)
prompts = st.lists(token_ids, min_size=1, max_size=9) | st.sampled_from(["the quick", "é你", "\ud800", ""])
batches = st.lists(st.tuples(prompts, options), min_size=1, max_size=REQUESTS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder, tokenizer=False, vocab_size=VOCAB_SIZE)
    with init_inference(str(folder), **settings(2)) as started:
        draw, modes = random.Random(0), started.config.parallel.available_modes
        started._engine.choose_mode = lambda _: draw.choice(modes)
        yield started._engine


@functools.cache
def reader(kind):
    return PromptReader(tokenizer_of(kind), VOCAB_SIZE, frozenset(EOS), seed=None)


def use_tokenizer(engine, kind):
    engine.prompts = reader(kind)
    engine.requests._prompts, engine.requests.decoder = engine.prompts, engine.prompts.decoder


def complete(engine, batch):
    """The outputs of a batch in order; None for requests that were refused."""
    names, outputs = [], {}
    for prompt, wanted in batch:
        try:
            names.append(engine.add(prompt, SamplingParams(**wanted)))
        except RequestError as error:
            check_refusal(str(error), prompt, wanted)
            names.append(None)
    while engine.has_unfinished:
        outputs |= {completion.request_id: completion.output() for completion in engine.step()}
    return [outputs.get(name) for name in names]


def check_refusal(message, prompt, wanted):
    assert "\n" not in message
    values = [prompt, *(prompt if isinstance(prompt, list) else ()), *wanted, *wanted.values()]
    for value in wanted.values():
        values += value if isinstance(value, list | dict) else ()
    shown = (
        [str(value) for value in values]
        + [repr(value) for value in values]
        + ["the prompt is empty", "this prompt", "prompt token id"]
    )
    assert any(text in message for text in shown if text), message


def check_output(engine, output, wanted):
    assert len(output.outputs) == wanted.get("n", 1)
    for each in output.outputs:
        if each.finish_reason == "error":
            assert each.stop_reason == CONSTRAINTS
            continue
        assert len(each.token_ids) <= wanted["max_tokens"]
        assert all(0 <= token < VOCAB_SIZE for token in each.token_ids)
        assert wanted.get("logprobs") is None or len(each.logprobs) == len(each.token_ids)
        check_constraints(engine, each, wanted)
        check_ending(engine, each, wanted)


def check_constraints(engine, output, wanted):
    allowed = wanted.get("allowed_token_ids")
    assert allowed is None or set(output.token_ids) <= set(allowed)
    spellings = engine.prompts._spellings  # None: the bytes of the tokens are not known
    pieces = [] if spellings is None else [spellings.token_bytes[token] for token in output.token_ids]
    for word in wanted.get("bad_words", ()):
        spelled = (b"".join(pieces[i:j]) for i, j in itertools.combinations(range(len(pieces) + 1), 2))
        assert word.encode(errors="replace") not in spelled
    structure = wanted.get("structured_outputs", {})
    if structure and output.finish_reason == "stop" and "stop" not in wanted and "stop_token_ids" not in wanted:
        text = output.text
        if "\ufffd" in text and pieces:  # the prompt ended within a character, so the text of its byte run is broken
            eos = engine.prompts.eos_token_ids
            text = b"".join(p for p, token in zip(pieces, output.token_ids, strict=True) if token not in eos).decode()
        check_structure(text, structure)


def check_structure(text, structure):
    if "choice" in structure:
        assert text.strip() in [choice.strip() for choice in structure["choice"]]
    elif "regex" in structure:
        assert re.fullmatch(structure["regex"], text)
    else:
        assert isinstance(json.loads(text), bool)


def check_ending(engine, output, wanted):
    eos = set() if wanted.get("ignore_eos") else engine.prompts.eos_token_ids
    if output.finish_reason == "length":
        assert len(output.token_ids) == wanted["max_tokens"]
    elif isinstance(output.stop_reason, str):
        assert output.stop_reason in wanted["stop"]
        assert (output.stop_reason in output.text) == wanted.get("include_stop_str_in_output", False)
    elif output.stop_reason is not None:
        assert output.token_ids[-1] == output.stop_reason
    elif "structured_outputs" not in wanted:
        assert output.token_ids[-1] in eos
    if output.stop_reason is None and output.finish_reason == "stop" and "structured_outputs" not in wanted:
        assert len(output.token_ids) >= wanted.get("min_tokens", 0)


def check(engine, kind, batch):
    use_tokenizer(engine, kind)
    for output, (_, wanted) in zip(complete(engine, batch), batch, strict=True):
        if output is not None:
            check_output(engine, output, wanted)
    assert engine.scheduler.allocator.num_used == 0


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=20)
@hypothesis.given(batch=batches)
def test_every_request_is_answered_or_refused(engine, kind, batch):
    check(engine, kind, batch)


def raise_at_the_third_call(owner, name):
    calls, original = itertools.count(1), getattr(owner, name)

    def raising(*args):
        if next(calls) >= 3:
            raise ZeroDivisionError("of a library")
        return original(*args)

    setattr(owner, name, raising)


def forbid_at_the_third_call(owner, name):
    calls, original = itertools.count(1), getattr(owner, name)
    setattr(owner, name, lambda *args: original(*args) if next(calls) < 3 else TokenMask(None, VOCAB_SIZE))


@pytest.mark.parametrize("place", ["grammar", "append", "end", "abort"])
def test_what_raises_for_one_request_ends_it_alone(engine, place):
    use_tokenizer(engine, "sentencepiece")
    others = [
        ([5, 6], {"seed": 3, "n": 2, "max_tokens": 9, "ignore_eos": True, "stop": ["zz"]}),
        ([8], {"temperature": 0, "max_tokens": 9, "ignore_eos": True, "bad_words": ["a"], "logprobs": 1}),
    ]
    expected = [[each.token_ids for each in output.outputs] for output in complete(engine, others)]
    name = engine.add([4], SamplingParams(seed=5, structured_outputs={"regex": "[a-z ]{9,}"}, stop=["zz"]))
    sequence = engine.requests._completions[name].sequences[0]
    if place == "grammar":
        raise_at_the_third_call(sequence.row.grammar, "mask")
    elif place == "append":
        raise_at_the_third_call(sequence.detokenizer, "append")
    else:
        forbid_at_the_third_call(sequence.row.grammar, "mask")
        sequence.detokenizer.finish = lambda: 1 / 0
    names, ended = [engine.add(prompt, SamplingParams(**wanted)) for prompt, wanted in others], {}
    for step in itertools.count():
        if step == 2 and place == "abort":
            engine.abort(name)
        if not engine.has_unfinished:
            break
        ended |= {completion.request_id: completion.output() for completion in engine.step()}
    assert [[each.token_ids for each in ended[other].outputs] for other in names] == expected
    if place != "abort":
        assert ended[name].outputs[0].finish_reason == "error"
        assert "ZeroDivisionError" in ended[name].outputs[0].stop_reason
    assert engine.scheduler.allocator.num_used == 0
    assert not engine.requests.sequences


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=300)
@hypothesis.given(batch=batches)
def test_thousands_of_requests_are_answered_or_refused(engine, kind, batch):
    check(engine, kind, batch)
