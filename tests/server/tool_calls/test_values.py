"""Values of calls as text, by every way in which a schema says their type."""

import json

import pytest
from formats import decoded, feed, joined, tool

from ulysses_infer.server.tool_calls import FORMATS, ArgumentsDelta

PLACE = {"type": "object", "properties": {"city": {"type": "string"}}}
DEFINITIONS = {
    "Place": PLACE,
    "Level": {"enum": [1, 2, "high"]},
    "Name": {"type": "string"},
    "Loop": {"$ref": "#/$defs/Loop"},
}
INTEGER = {"type": "integer"}
VALUES = [
    ({"anyOf": [INTEGER, {"type": "null"}]}, "7", 7),
    ({"anyOf": [INTEGER, {"type": "null"}]}, "None", None),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "007", "007"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "7", "7"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["integer", "null"]}, "3", 3),
    ({"type": ["string", "integer"]}, "3", "3"),
    ({"type": "string"}, "null", "null"),
    ({"$ref": "#/$defs/Place"}, '{"city": "Bern"}', {"city": "Bern"}),
    ({"$ref": "#/$defs/Name"}, "12", "12"),
    ({"$ref": "#/$defs/Level"}, "1", 1),
    ({"$ref": "#/$defs/Level"}, "high", "high"),
    ({"$ref": "#/$defs/Loop"}, "1", "1"),
    ({"$ref": "#/$defs/Missing"}, "1", "1"),
    ({"allOf": [{"$ref": "#/$defs/Place"}], "default": {}}, "{}", {}),
    ({"allOf": [{"type": ["string", "number"]}, {"not": {"type": "string"}}]}, "1.5", 1.5),
    ({"oneOf": [{"type": "array", "items": INTEGER}, {"type": "object"}]}, "[1, 2]", [1, 2]),
    ({"oneOf": [{"type": "array"}, {"anyOf": [{"$ref": "#/$defs/Name"}, INTEGER]}]}, "[1]", "[1]"),
    ({"const": 3}, "3", 3),
    ({"const": "3"}, "3", "3"),
    ({"const": True}, "True", True),
    ({"enum": ["1", "2"]}, "1", "1"),
    ({"enum": ["Bern"]}, '"Bern"', "Bern"),
    ({"enum": [None, "a"]}, "null", None),
    ({"type": "boolean"}, "False", False),
    (INTEGER, "seven", "seven"),
    (INTEGER, "1e400", "1e400"),
    ({"type": "object"}, "[" * 5000, "[" * 5000),
    ({}, "12", "12"),
    (True, "12", "12"),
    ({"type": "array", "items": {"type": "string"}}, "[1]", [1]),
]


def calls_of(parameters, **arguments):
    body = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in arguments.items())
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    text = f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
    whole = joined(feed(FORMATS["qwen3_coder"].parser(tools), text))
    assert joined(feed(FORMATS["qwen3_coder"].parser(tools), text, range(len(text)))) == whole
    assert whole[0] == ""
    return decoded(whole[1])


@pytest.mark.parametrize(("schema", "text", "value"), VALUES, ids=[f"{s} {t[:9]}" for s, t, _ in VALUES])
def test_text_becomes_the_value_that_the_schema_means(schema, text, value):
    for name in ("a", "type", "properties", "$ref", "enum", "anyOf"):
        parameters = {"type": "object", "properties": {name: schema}, "$defs": DEFINITIONS}
        assert calls_of(parameters, **{name: text}) == [("f", {name: value})]


def test_properties_may_be_written_elsewhere():
    integers = {"properties": {"a": INTEGER}}
    for parameters in (
        {"$ref": "#/$defs/P", "$defs": {"P": integers}},
        {"allOf": [{"properties": {"a": {"type": ["string", "integer"]}}}, integers]},
        {"anyOf": [integers, {"properties": {"b": {}}}]},
        {"additionalProperties": INTEGER},
    ):
        assert calls_of(parameters, a="1") == [("f", {"a": 1})]


def test_strings_stream_and_other_values_come_whole():
    tools = [tool("f", a={"type": "string"}, b={"anyOf": [INTEGER, {"type": "null"}]})]
    parser = FORMATS["qwen3_coder"].parser(tools)
    text = "<function=f><parameter=a>abc</parameter><parameter=b>123</parameter></function>"
    pieces = [e.text for character in text for e in parser.push(character) if isinstance(e, ArgumentsDelta)]
    assert pieces == ['{"a": "', "a", "b", "c", '"', ', "b": 123', "}"]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<function=f><parameter=b>12", "{}"),
        ("<function=f><parameter=a>x</parameter><parameter=b>12", '{"a": "x"}'),
        ("<function=f><parameter=a>x</parameter>\n<param", '{"a": "x"}'),
        ("<function=f><parameter=a>x</parameter>\n</func", '{"a": "x"}'),
        ("<function=f><parameter=a>x", '{"a": "x'),
        ("<function=f><parameter=a>x\n</para", '{"a": "x'),
    ],
)
def test_a_cut_call_has_what_is_complete(text, arguments):
    tools = [tool("f", a={"type": "string"}, b=INTEGER)]
    for is_cut in (False, True):
        parser = FORMATS["qwen3_coder"].parser(tools)
        events = [event for character in text for event in parser.push(character)]
        assert joined(events + parser.finish(is_cut)) == ("", [("f", arguments)])
    assert json.loads(json.dumps(arguments))
