"""Outputs that are calls or match a response format: the parser reads exactly what the grammar admits."""

import json

import pytest
from formats import RENDER, TOOLS, decoded, feed, joined

from tests.text.grammars import NUM_BYTES, matcher, matches
from ulysses_infer.server.tool_calls import FORMATS, calls_grammar, formatted_parser, tool_choice_constraint

NAMES = sorted(FORMATS)
RENDERED = sorted(name for name in RENDER if name != "required")
CALLS = [("get_weather", {"city": 'Bern "x"', "days": 3}), ("now", {}), ("search", {"query": "a; b", "exact": True})]
ANSWER = [{"json": {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}}]


def wanted(name, special=None, parallel=True, tools=TOOLS):
    return {"alternatives": [ANSWER, *calls_grammar(FORMATS[name], tools, special or {}, parallel)]}


def base(name):
    return name.split()[0]


def rendered(name, calls):
    """As models write calls, with JSON's names of constants in Python's calls."""
    text = RENDER[name](calls)
    return text.replace("True", "true").replace("'", '"') if name == "pythonic" else text


@pytest.mark.parametrize("name", RENDERED)
def test_calls_and_the_format_are_admitted(name):
    calls = CALLS if name != "pythonic" else [("get_weather", {"city": "Bern", "days": 3}), *CALLS[1:]]
    assert matches(rendered(name, calls), **wanted(base(name)))
    for call in calls:
        assert matches(rendered(name, [call]), **wanted(base(name), parallel=False))
    assert not matches(rendered(name, calls), **wanted(base(name), parallel=False))
    assert matches('{"answer": "<tool_call>"}', **wanted(base(name)))


@pytest.mark.parametrize("name", RENDERED)
def test_other_text_and_wrong_arguments_are_not(name):
    assert not matches("I think so.", **wanted(base(name)))
    assert not matches('{"answer": 1}', **wanted(base(name)))
    assert not matches(rendered(name, [("unknown", {})]), **wanted(base(name)))
    assert not matches(rendered(name, [("get_weather", {"days": "three"})]), **wanted(base(name)))


@pytest.mark.parametrize("name", NAMES)
def test_tags_may_be_special_tokens(name):
    chosen = FORMATS[name]
    text = rendered(name, CALLS[1:2])
    present = [tag for tag in chosen.tags if tag in text]
    for tag in present:
        if name == "qwen3_coder" and tag.endswith("="):
            continue
        parts = text.split(tag)
        tokens = [part for pair in zip(parts, [NUM_BYTES] * len(parts), strict=True) for part in pair][:-1]
        grammar = wanted(name, {tag: [NUM_BYTES]})
        assert matches(tokens, **grammar)
        assert not matches(text, **grammar)


def test_required_arguments_and_their_order_in_python_calls():
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x"]}, "c": {}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {**parameters, "required": ["b"]}}}]
    for text in ('[f(b="x")]', '[f(a=1, b="x")]', '[f(a=1,b="x", c=[true])]'):
        assert matches(text, **wanted("pythonic", tools=tools))
    for text in ("[f()]", "[f(a=1)]", '[f(b="y")]', '[f(b="x", a=1)]', '[f(b="x", b="x")]'):
        assert not matches(text, **wanted("pythonic", tools=tools))


SCHEMA = {
    "$id": "https://example.com/tool",
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "$defs": {"Place": {"type": "object", "properties": {"$ref": {"type": "integer"}}, "required": ["$ref"]}},
    "properties": {
        "default": {"$ref": "#/$defs/Place"},
        "type": {"enum": ["a", "b"]},
        "properties": {"type": "string"},
        "enum": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
    },
    "required": ["default", "type", "properties", "enum"],
}


@pytest.mark.parametrize("name", RENDERED)
def test_references_and_names_of_keywords(name):
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    arguments = {"default": {"$ref": 1}, "type": "b", "properties": "<p>", "enum": [{"$ref": 2}]}
    text = rendered(name, [("f", arguments)])
    assert matches(text, **wanted(base(name), tools=tools))
    assert decoded(joined(feed(formatted_parser(FORMATS[base(name)], tools), text))[1]) == [("f", arguments)]
    wrong = rendered(name, [("f", {**arguments, "enum": [{"$ref": "x"}]})])
    assert not matches(wrong, **wanted(base(name), tools=tools))


def test_references_of_a_demanded_call():
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    arguments = {"default": {"$ref": 1}, "type": "b", "properties": "<p>", "enum": [{"$ref": 2}]}
    schema = tool_choice_constraint(tools, "required").json
    assert matches(json.dumps([{"name": "f", "parameters": arguments}]), json=schema)
    arguments["default"] = {"$ref": "x"}
    assert not matches(json.dumps([{"name": "f", "parameters": arguments}]), json=schema)


@pytest.mark.parametrize("name", NAMES)
def test_tags_inside_an_answer_are_its_text(name):
    text = json.dumps({"answer": "<tool_call><function=now></function></tool_call>[TOOL_CALLS]now[ARGS]{}"})
    for cuts in ((), range(len(text))):
        assert joined(feed(formatted_parser(FORMATS[name], TOOLS), text, cuts)) == (text, [])


@pytest.mark.parametrize("name", RENDERED)
def test_calls_are_read_however_they_are_cut(name):
    text = RENDER[name](CALLS)
    for cuts in ((), range(len(text))):
        content, calls = joined(feed(formatted_parser(FORMATS[base(name)], TOOLS), text, cuts))
        assert (content, decoded(calls)) == ("", CALLS)


def test_short_outputs_are_given_out():
    for text in ("", " ", "<tool", '"'):
        assert joined(feed(formatted_parser(FORMATS["hermes"], TOOLS), text)) == (text, [])


def test_many_tools_compile():
    tools = [{"type": "function", "function": {"name": f"f{index}", "parameters": SCHEMA}} for index in range(20)]
    for name in NAMES:
        assert matcher(**wanted(name, tools=tools))
