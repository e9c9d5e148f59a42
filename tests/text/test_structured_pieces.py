"""Alternatives of text, tokens and JSON."""

import pytest
from grammars import NUM_BYTES, matcher, matches
from tokenizers_to_try import byte_level

from ulysses_infer.errors import RequestError
from ulysses_infer.structured_outputs import StructuredOutputs
from ulysses_infer.text.structured import GrammarCompiler, check

OPEN, CLOSE = NUM_BYTES, NUM_BYTES + 1
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CALL = [{"tokens": [OPEN]}, {"text": "f"}, {"regex": "[ /]?"}, {"json": OBJECT}, {"tokens": [CLOSE]}]
ANSWER = [{"json": OBJECT}]
WANTED = [ANSWER, [{"repeat": [CALL], "min": 1, "max": 2}]]


def test_either_alternative_is_admitted():
    assert matches('{"a": 1}', alternatives=WANTED)
    for space in ("", " ", "/"):
        assert matches([OPEN, f'f{space}{{"a": 1}}', CLOSE], alternatives=WANTED)
    assert matches([OPEN, 'f{"a":1}', CLOSE] * 2, alternatives=WANTED)


@pytest.mark.parametrize(
    "text", ['{"a": "x"}', "text", ['{"a": 1}', OPEN], [OPEN, 'f{"a":1}'], [OPEN, 'f{"a":1}', CLOSE] * 3], ids=str
)
def test_nothing_else_is_admitted(text):
    assert not matches(text, alternatives=WANTED)


def test_schemas_inside_are_checked():
    with pytest.raises(RequestError, match="minimum"):
        matcher(alternatives=[[{"json": {"type": "integer", "minimum": 10**20}}]])


@pytest.mark.parametrize("tokens", [[NUM_BYTES + 2], [7, 10**6]])
def test_tokens_beyond_the_vocabulary_are_refused(tokens):
    compiler = GrammarCompiler(None, NUM_BYTES + 2)
    for pieces in ([{"tokens": tokens}], [{"repeat": [[{"tokens": tokens}]], "min": 0, "max": 1}]):
        with pytest.raises(RequestError, match="vocabulary lacks"):
            compiler.state(StructuredOutputs(alternatives=[ANSWER, pieces]), ())


def test_special_tokens_of_a_tokenizer_are_admitted_where_they_stand():
    tokenizer = byte_level()
    opener, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    letter = tokenizer.convert_tokens_to_ids("a")
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    wanted = StructuredOutputs(alternatives=[[{"text": "a"}], [{"tokens": [opener]}, {"text": "a"}]])
    state = compiler.state(wanted, [end])
    assert {*state.mask([]).token_ids()} == {opener, letter}
    assert {*state.mask([opener]).token_ids()} == {letter}
    assert {*state.mask([opener, letter]).token_ids()} == {end}


def test_the_early_check_admits_tokens():
    check(StructuredOutputs(alternatives=WANTED))


NESTED = [{"text": "a"}]
for _ in range(20):
    NESTED = [{"repeat": [NESTED], "min": 0, "max": None}]
WRONG = [
    {},
    [],
    [{"text": "a"}],
    [[{"text": ""}]],
    [[{"tokens": ["x"]}]],
    [[{"other": 1}]],
    [[{"regex": "a\n%json {}"}]],
]


@pytest.mark.parametrize("wanted", [*WRONG, [NESTED], [[{"repeat": [[]], "min": 3, "max": 1}]]], ids=range(9))
def test_wrong_pieces_are_refused(wanted):
    with pytest.raises(RequestError, match=r"alternatives|nothing to match"):
        matcher(alternatives=wanted)
