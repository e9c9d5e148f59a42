"""White space in JSON is bounded, unless a request says otherwise."""

import json

import pytest
from grammars import matcher, matches

from ulysses_infer.errors import RequestError

SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
KINDS = ({"json": SCHEMA}, {"json_object": True})
DEPTH = 60


def greedy(preferred, **wanted):
    """What a model writes that prefers the characters `preferred` wherever the grammar admits them."""
    state, output = matcher(**wanted), b""
    while not state.is_accepting():
        bits = state.compute_bitmask()
        allowed = [byte for byte in range(128) if bits[byte // 8] >> (byte % 8) & 1]
        order = [*preferred.encode(), *b'}]":{[a0,']
        byte = min(allowed, key=lambda byte: order.index(byte) if byte in order else 256)
        output += bytes([byte])
        state.consume_token(byte)
        assert len(output) < 1000
    return output.decode()


@pytest.mark.parametrize("wanted", KINDS, ids=str)
@pytest.mark.parametrize("preferred", ["\n", " ", "\t", "\n ", " \n", "\n\t", "\r\n"], ids=repr)
def test_a_model_that_prefers_white_space_comes_to_an_end(wanted, preferred):
    text = greedy(preferred, **wanted)
    assert isinstance(json.loads(text), dict)
    assert len(text) < DEPTH


@pytest.mark.parametrize("wanted", KINDS, ids=str)
def test_compact_and_indented_json_is_admitted(wanted):
    value = {"a": [1, 2]}
    for text in (
        json.dumps(value),
        json.dumps(value, separators=(",", ":")),
        *(json.dumps(value, indent=n) for n in (2, 4)),
    ):
        assert matches(text, **wanted)
    for text in ('{"a":  [1]}', '{\n\n"a": [1]}', '{\n         "a": [1]}', '{"a": [1]}\n', ' {"a": [1]}'):
        assert not matches(text, **wanted)


@pytest.mark.parametrize("wanted", KINDS, ids=str)
def test_a_request_may_ask_for_free_form_or_none(wanted):
    for pattern in (r"[ \n\t\r]*", r"\s+", "[\n ]{0,9}"):
        assert matches('{\n\n   "a"  : [1]}', **wanted, whitespace_pattern=pattern)
    assert matches('{"a": [1]}', **wanted, whitespace_pattern="[ ]?")
    for options in ({"disable_any_whitespace": True}, {"whitespace_pattern": ""}):
        assert matches('{"a":[1]}', **wanted, **options)
        assert not matches('{"a": [1]}', **wanted, **options)


@pytest.mark.parametrize("pattern", ["a", "[^x]", ".", "(?i) ", r"\S", r"\x41", " " * 100, 7, "\u00a0"], ids=repr)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(RequestError, match="whitespace_pattern"):
        matcher(json_object=True, whitespace_pattern=pattern)


def test_both_options_exclude_each_other():
    with pytest.raises(RequestError, match="use one of them"):
        matcher(json_object=True, whitespace_pattern=" ", disable_any_whitespace=True)
