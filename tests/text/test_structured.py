"""Structured outputs match their grammar, whatever the logits are."""

import json
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_to_try import KINDS, make, word_piece

from ulysses_infer.errors import RequestError
from ulysses_infer.model.sampling.row import SamplingRow, needs_full_logits
from ulysses_infer.model.sampling.sampler import NO_TOKEN, Sampler
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.structured_outputs import StructuredOutputs
from ulysses_infer.text.detokenizer import Detokenizer, TokenDecoder
from ulysses_infer.text.structured import GrammarCompiler, check

PADDING = 7
LIMIT = 900


class Writer:
    """Samples outputs of random logits, as the engine does with a model's."""

    def __init__(self, tokenizer):
        self.vocab_size = len(tokenizer) + PADDING
        self.compiler = GrammarCompiler(tokenizer, self.vocab_size)
        self.decoder = TokenDecoder(tokenizer)
        self.eos = tokenizer.eos_token_id
        self.prompt = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def row(self, params, seed=0, outputs=None):
        ends = [] if params.ignore_eos else [self.eos]
        grammar = self.compiler.state(params.structured_outputs, [*ends, *(params.stop_token_ids or ())])
        eos = frozenset([self.eos])
        return SamplingRow(params, seed, self.prompt, [] if outputs is None else outputs, eos, None, grammar)

    def logits(self, seed, position, spread=3.0):
        generator = torch.Generator().manual_seed(seed * 100_003 + position)
        return torch.randn(1, self.vocab_size, generator=generator) * spread

    def write(self, wanted, seed=0, limit=LIMIT, **params):
        """The text and whether it came to an end."""
        sampling = SamplingParams(structured_outputs=wanted, max_tokens=None, **params)
        row = self.row(sampling, seed)
        ended = False
        while not ended and len(row.output_token_ids) < limit:
            (token,) = Sampler().sample(self.logits(seed, len(row.output_token_ids)), [row])
            ended = token in (self.eos, NO_TOKEN)
            assert token != NO_TOKEN or row.may_end, "the grammar leads nowhere"
            if not ended:
                row.output_token_ids.append(token)
        assert max(row.output_token_ids, default=0) < self.vocab_size - PADDING
        return self.text(sampling, row.output_token_ids), ended

    def text(self, params, token_ids):
        detokenizer = Detokenizer(self.decoder, params, self.prompt)
        detokenizer.append(token_ids)
        detokenizer.finish()
        return detokenizer.text


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    return {kind: Writer(make(kind, tmp_path_factory.mktemp("tokenizer"))) for kind in KINDS}


@pytest.fixture(scope="module")
def writer(writers):
    return writers["byte level"]


# --- schemas, and whether a value fits one ---

keys = st.sampled_from(["name", "a", "é", "x y", "12"])
ascii_keys = st.sampled_from(["name", "a", "b", "x y", "12"])


def _object(inner):
    return st.dictionaries(ascii_keys, inner, max_size=3).flatmap(
        lambda properties: st.builds(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            },
            st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([]),
        )
    )


schemas = st.recursive(
    st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
            st.integers(-99, 99),
            st.integers(0, 500),
        ),
        st.builds(
            lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
            st.integers(0, 2),
            st.integers(0, 3),
        ),
        st.lists(st.sampled_from(["x", "yes", 'a"b', 1, None, True]), min_size=1, max_size=3).map(
            lambda values: {"enum": values}
        ),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}-[0-9]$"}),
    ),
    lambda inner: st.one_of(
        _object(inner),
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 1),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)


def fits(schema, value):
    if "enum" in schema:
        return any(value == option and type(value) is type(option) for option in schema["enum"])
    if "anyOf" in schema:
        return any(fits(option, value) for option in schema["anyOf"])
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            matches = isinstance(value, str) and bool(re.search(schema.get("pattern", ""), value))
            return matches and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
        case "array":
            sized = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return sized and all(fits(schema["items"], part) for part in value)
    return isinstance(value, dict) and fits_object(schema, value)


def fits_object(schema, value):
    known = set(value) <= set(schema["properties"]) and set(schema["required"]) <= set(value)
    return known and all(fits(schema["properties"][key], part) for key, part in value.items())


@pytest.mark.parametrize("kind", KINDS)
@given(schema=schemas, seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 1.0, 2.0]), spaces=st.booleans())
@settings(max_examples=25, deadline=None)
def test_outputs_fit_their_schema(writers, kind, schema, seed, temperature, spaces):
    wanted = {"json": schema, "disable_any_whitespace": not spaces}
    text, ended = writers[kind].write(wanted, seed, temperature=temperature)
    if ended:
        assert fits(schema, json.loads(text)), text
    else:
        assert spaces, "without white space every text is short"


EXPECTED = [
    ({"regex": r"[A-C]{2}-[0-9]{1,3}"}, r"[A-C]{2}-[0-9]{1,3}"),
    ({"regex": r"^(yes|no)!$"}, r"(yes|no)!"),
    ({"regex": "a|b$"}, "a|b"),
    ({"regex": r"a/b\n{0}[^/]"}, r"a/b[^/]"),
    ({"choice": ["yes", "no", 'may"be\\', "no way"]}, r'yes|no|may"be\\|no way'),
    ({"grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
    ({"grammar": 'root ::= "a" digit{2} | "b" digit\ndigit ::= [0-9]'}, r"a\d\d|b\d"),
    ({"json": '{"const": {"a": [1, "x"]}}', "disable_any_whitespace": True}, r'\{"a":\[1,"x"\]\}'),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("wanted", "pattern"), EXPECTED, ids=[str(wanted) for wanted, _ in EXPECTED])
def test_outputs_match_regex_choice_and_grammar(writers, kind, wanted, pattern):
    for seed in range(8):
        text, ended = writers[kind].write(wanted, seed, temperature=1.0 + seed / 8)
        assert ended
        assert re.fullmatch(pattern, text), text
        assert text.count("(") == text.count(")") or "regex" in wanted


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "demo"])
def test_text_outside_ascii_comes_out_whole(writers, kind):
    wanted = {"choice": ["日本語", "né", "😀😀"]}
    assert {writers[kind].write(wanted, seed)[0] for seed in range(30)} == set(wanted["choice"])


def test_json_object_gives_an_object(writer):
    seen = [writer.write({"json_object": True}, seed, limit=3000) for seed in range(5)]
    assert all(isinstance(json.loads(text), dict) for text, ended in seen if ended)
    assert all(text.lstrip().startswith("{") for text, _ in seen)
    assert any(ended for _, ended in seen)


def test_white_space_is_bounded(writer):
    row = writer.row(SamplingParams(structured_outputs={"json_object": True}), outputs=[])
    space = writer.compiler._tokenizer.encode(" ", add_special_tokens=False)[-1]
    brace = writer.compiler._tokenizer.encode("{", add_special_tokens=False)[-1]
    row.output_token_ids.append(brace)
    while space in row.grammar.mask(row.output_token_ids).token_ids():
        row.output_token_ids.append(space)
        assert len(row.output_token_ids) < 100


# --- together with everything else ---


def allowed(row):
    return set(row.grammar.mask(row.output_token_ids).token_ids().tolist())


def ids(writer, text):
    return [writer.compiler._tokenizer.convert_tokens_to_ids(character) for character in text]


def test_only_eos_may_follow_a_complete_output(writer):
    row = writer.row(SamplingParams(structured_outputs={"regex": "ab"}), outputs=ids(writer, "ab"))
    assert allowed(row) == {writer.eos}
    assert row.may_end


def test_eos_may_end_what_could_go_on(writer):
    row = writer.row(SamplingParams(structured_outputs={"regex": "ab*"}), outputs=ids(writer, "ab"))
    assert allowed(row) == {writer.eos, *ids(writer, "b")}


def test_stop_tokens_may_end_an_output_too(writer):
    params = SamplingParams(structured_outputs={"regex": "ab"}, stop_token_ids=[2], ignore_eos=True)
    assert allowed(writer.row(params, outputs=ids(writer, "ab"))) == {2}


@pytest.mark.parametrize(
    "params", [{"ignore_eos": True}, {"min_tokens": 9}, {"allowed_token_ids": [68, 69, 70]}], ids=str
)
def test_without_an_ending_token_a_complete_output_allows_no_token(writer, params):
    if "allowed_token_ids" in params:
        params = {"allowed_token_ids": ids(writer, "abc")}
    row = writer.row(SamplingParams(structured_outputs={"regex": "ab"}, temperature=0, **params), outputs=[])
    for token in [*ids(writer, "ab"), NO_TOKEN]:
        assert Sampler().sample(torch.zeros(1, writer.vocab_size), [row]) == [token]
        row.output_token_ids.append(token)
    row.output_token_ids.pop()
    assert row.may_end


def test_other_processors_choose_among_what_the_grammar_allows(writer):
    a, b, c = ids(writer, "abc")

    def first(**params):
        sampling = SamplingParams(structured_outputs={"regex": "[abc]d"}, temperature=0, **params)
        return Sampler().sample(torch.zeros(1, writer.vocab_size), [writer.row(sampling)])[0]

    assert first() == min(a, b, c)
    assert first(logit_bias={c: 5.0, writer.eos: 100.0}) == c
    assert first(allowed_token_ids=[b, writer.eos]) == b
    assert first(allowed_token_ids=[writer.eos]) == NO_TOKEN
    assert first(logit_bias={a: -100.0, b: -50.0, c: -100.0}) == b


def test_penalties_work_on_allowed_tokens(writer):
    params = SamplingParams(structured_outputs={"regex": "[ab]{4}"}, temperature=0, presence_penalty=2.0)
    row, logits = writer.row(params, outputs=[]), torch.zeros(1, writer.vocab_size)
    for _ in range(2):
        row.output_token_ids += Sampler().sample(logits, [row])
    assert set(row.output_token_ids) == set(ids(writer, "ab"))


def test_a_grammar_needs_whole_rows_and_leaves_others_alone(writer):
    params = SamplingParams(structured_outputs={"choice": ["a"]}, temperature=0)
    assert needs_full_logits(params)
    plain = SamplingRow(SamplingParams(temperature=0), 0, [1], [])
    logits = writer.logits(1, 0).repeat(2, 1)
    tokens = Sampler().sample(logits, [plain, writer.row(params)])
    assert tokens == [int(logits[0].argmax()), ids(writer, "a")[0]]


def test_states_of_one_grammar_are_independent(writer):
    wanted = {"choice": ["ab", "ba"]}
    first, second = (writer.row(SamplingParams(structured_outputs=wanted), outputs=[]) for _ in range(2))
    a, b = ids(writer, "ab")
    first.output_token_ids.append(a)
    second.output_token_ids.append(b)
    assert (allowed(first), allowed(second)) == ({b}, {a})
    assert allowed(writer.row(SamplingParams(structured_outputs=wanted), outputs=[])) == {a, b}


def test_a_second_or_late_mask_request_changes_nothing(writer):
    params = SamplingParams(structured_outputs={"regex": "[ab]{3}c"})
    stepwise, late = writer.row(params, outputs=[]), writer.row(params, outputs=ids(writer, "aba"))
    for token in ids(writer, "aba"):
        allowed(stepwise)
        allowed(stepwise)
        stepwise.output_token_ids.append(token)
    assert allowed(stepwise) == allowed(late) == set(ids(writer, "c"))


# --- what is refused ---

RULES = "".join(f'r{i}: "a" | r{i + 1}\n' for i in range(5000))
TERMINALS = "".join(f'T{i}: "a" T{i + 1}\n' for i in range(4000))
REFERENCES = {f"{i}": {"items": {"$ref": f"#/d/{i + 1}"}} for i in range(2500)}


def options_of(index):
    return {"anyOf": [{"properties": {f"{index}{j}": {"type": "null"}}, "required": [f"{index}{j}"]} for j in range(6)]}


HOSTILE = {
    "crossing rules": {"grammar": f'start: r0\n{RULES}r5000: "x"'},
    "chained terminals": {"grammar": f'start: T0\n{TERMINALS}T4000: "x"'},
    "chained references": {"json": {"$ref": "#/d/0", "d": {**REFERENCES, "2500": {}}}},
    "nested schema": {"json": '{"items":' * 5000 + "{}" + "}" * 5000},
    "nested text": {"json": "[" * 100_000},
    "no object": {"json": "[1]"},
    "no json": {"json": "{oops"},
    "never matches": {"regex": r"[^\s\S]"},
    "endless rule": {"grammar": "start: start"},
    "endless reference": {"json": {"$ref": "#"}},
    "huge divisor": {"json": {"type": "integer", "multipleOf": 999_983}},
    "unknown keyword": {"json": {"not": {"type": "string"}}},
    "lenient": {"json": {"not": {"type": "string"}, "x-guidance": {"lenient": True}}},
    "remote reference": {"json": {"$ref": "http://localhost/x.json"}},
    "file reference": {"json": {"$ref": "file:///etc/passwd"}},
    "contradiction": {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    "combinations": {"json": {"allOf": [options_of(index) for index in range(10)]}},
    "wrong type": {"json": {"type": "strin"}},
    "open group": {"regex": "a("},
    "look-ahead": {"regex": "(?=a)b"},
    "back reference": {"regex": r"(a)\1"},
    "deep groups": {"regex": "(" * 20_000 + ")" * 20_000},
    "many options": {"regex": "(a|aa)*" * 2000},
    "no grammar": {"grammar": "hello"},
    "unknown rule": {"grammar": "start: foo"},
    "schema inside": {"grammar": 'start: %json {"multipleOf": 999983}'},
    "no gbnf": {"grammar": "root ::= ("},
    "deep gbnf": {"grammar": "root ::= " + "(" * 20_000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_matched_is_refused_in_one_line_and_soon(writer, name):
    started = time.process_time()
    refusal = refused(lambda: writer.compiler.state(StructuredOutputs(**HOSTILE[name]), ()))
    assert time.process_time() - started < 3
    if name in ("crossing rules", "chained terminals", "chained references", "many options"):  # heavy, but possible
        return
    assert refusal
    assert "\n" not in refusal
    assert len(refusal) < 300


def refused(call):
    """The message that `call` is refused with, or None."""
    try:
        call()
    except RequestError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", HOSTILE)
def test_the_early_check_refuses_nothing_that_could_be_served(writer, name):
    wanted = StructuredOutputs(**HOSTILE[name])
    early = refused(lambda: check(wanted))
    assert early is None or refused(lambda: writer.compiler.state(wanted, ()))


@pytest.mark.parametrize("wanted", [wanted for wanted, _ in EXPECTED], ids=str)
def test_the_early_check_lets_good_ones_pass(wanted):
    check(StructuredOutputs(**wanted))


EXPLOSIVE = [
    {"regex": "(a{1000}){1000}"},
    {"regex": ".*a.{200}"},
    {"json": {"type": "string", "pattern": "(([a-z]{1,99}){1,99}){1,99}"}},
    {"grammar": 'start: x+\nx: x x | "a" | "b"'},
    {"json": {"type": "number", "minimum": -1e9, "multipleOf": 0.01}},
]


@pytest.mark.parametrize("wanted", EXPLOSIVE, ids=str)
def test_what_grows_while_it_runs_is_bounded(writer, wanted):
    try:
        row = writer.row(SamplingParams(structured_outputs=wanted), outputs=[])
    except RequestError:
        return
    for position in range(60):
        started = time.process_time()
        (token,) = Sampler().sample(writer.logits(3, position), [row])
        assert time.process_time() - started < 1
        if token in (NO_TOKEN, writer.eos):
            return
        row.output_token_ids.append(token)


def test_a_large_choice_is_served(writer):
    options = [f"option number {index}" for index in range(5000)]
    text, ended = writer.write({"choice": options}, 1)
    assert ended
    assert text in options


def test_without_a_tokenizer_or_with_a_strange_one_requests_are_refused():
    for tokenizer, message in ((None, "needs a tokenizer"), (word_piece(), "does not understand")):
        compiler = GrammarCompiler(tokenizer, 10)
        for _ in range(2):
            with pytest.raises(RequestError, match=message):
                compiler.state(StructuredOutputs(choice=["a"]), ())
