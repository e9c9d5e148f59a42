"""JSON schemas are obeyed or refused by the name of the keyword."""

import json
import logging
from fractions import Fraction
from itertools import product

import pytest
from grammars import matcher, matches, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.errors import RequestError
from ulysses_infer.text import structured_schema

BIG = 10**20


def fits(schema, value):
    return matches(json.dumps(value, ensure_ascii=False), json=schema)


REFUSED = {
    "minimum": {"type": "integer", "minimum": BIG, "maximum": BIG + 9},
    "maximum": {"type": "integer", "maximum": 2**63},
    "exclusiveMinimum": {"type": "number", "exclusiveMinimum": 2**60 + 1},
    "const": {"const": 2**53 + 1},
    "enum": {"enum": [1, {"a": [2**63]}]},
    "minLength": {"type": "string", "minLength": 2**64},
    "minItems": {"type": "array", "minItems": 2**33},
    "multipleOf": {"type": "number", "multipleOf": 0.123456789},
    "minProperties": {"type": "object", "minProperties": 2},
    "pattern": {"type": "string", "pattern": "^[a&&b]$"},
    "patternProperties": {"patternProperties": {"[a--b]": {"type": "integer"}}},
    "propertyNames": {"type": "object", "propertyNames": {"format": "date"}},
}


@pytest.mark.parametrize(("keyword", "schema"), list(REFUSED.items()))
def test_what_cannot_be_obeyed_is_refused_by_name(keyword, schema):
    with pytest.raises(RequestError, match=rf"{keyword} "):
        matcher(json={"type": "object", "properties": {"x": {"anyOf": [schema]}}})


@pytest.mark.parametrize(
    "keyword", ["not", "contains", "if", "dependentRequired", "dependentSchemas", "unevaluatedProperties"]
)
def test_other_assertions_are_refused_by_name(keyword):
    schema = {"type": "object", keyword: {"a": ["b"]}, "then": {}, "anyOf": [{"type": "object"}]}
    with pytest.raises(ValueError, match=keyword):
        matcher(json=schema)


def test_several_multiples_cannot_be_combined_to_a_huge_automaton():
    with pytest.raises(RequestError, match="multipleOf may be combined to 99400891"):
        matcher(json={"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]})
    matcher(json={"properties": {"a": {"type": "integer", "multipleOf": 9973}, "b": {"multipleOf": 9967}}})


@pytest.mark.parametrize("bound", [2**53, 2**53 + 1, 2**53 + 3, 2**62 + 1, 2**63 - 1025, 2**63 - 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_bounds_on_integers_hold_up_to_64_bits(bound, sign):
    schema = {"type": "integer", "maximum" if sign > 0 else "minimum": sign * bound}
    assert fits(schema, sign * (bound - 2048))
    assert not fits(schema, sign * (bound + 1))
    strict = {"type": "integer", "exclusiveMaximum" if sign > 0 else "exclusiveMinimum": sign * bound}
    assert fits(strict, sign * (bound - 2048))
    assert not fits(strict, sign * bound)


def test_the_range_of_64_bits_is_served():
    schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert fits(schema, 2**63 - 1)
    assert fits(schema, -(2**63) + 2048)
    assert not fits(schema, 2**63)


BOUNDS = (None, 0, 1, -1, 0.5, 1.25, -1.25, 0.001, -0.001, 100, 99.99)
LITERALS = (
    "0",
    "0.0",
    "-0",
    "1",
    "1.0",
    "-1",
    "-1.0",
    "0.5",
    "1.25",
    "1.250",
    "-1.25",
    "0.001",
    "-0.001",
    "1.2",
    "-1.2",
)
LITERALS += ("0.0001", "-0.0001", "0.9", "99", "99.99", "100", "100.0", "101")


@pytest.mark.parametrize("strict", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_no_number_outside_its_bounds_is_written(strict):
    for low, high in product(BOUNDS, repeat=2):
        if (low is None and strict[0]) or (high is None and strict[1]) or (None not in (low, high) and low >= high):
            continue
        bounds = {("minimum", "exclusiveMinimum")[strict[0]]: low, ("maximum", "exclusiveMaximum")[strict[1]]: high}
        schema = {"type": "number", **{key: value for key, value in bounds.items() if value is not None}}
        for literal in LITERALS:
            if matches(literal, json=schema):
                assert low is None or _is_above(literal, low, strict[0]), (schema, literal)
                assert high is None or _is_above(high, literal, strict[1]), (schema, literal)


def _is_above(number, bound, strict):
    number, bound = Fraction(str(number)), Fraction(str(bound))
    return number > bound or (number == bound and not strict)


def test_keys_cannot_be_repeated_in_escaped_form():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert not matches(r'{"\u0061":"x"}', json=schema)
    assert fits(schema, {"a": 1, "b": "é"})
    assert matches(r'"\u0001"', json={"const": "\x01"})


def test_annotations_are_ignored():
    for name in ("binary", "int32", "path", "ipvanyaddress", "unknown"):
        assert fits({"type": "string", "format": name}, "x")
    assert not fits({"type": "string", "format": "date"}, "x")
    schema = {"type": "array", "items": {"type": "integer"}, "contentSchema": {}, "deprecated": True, "then": {}}
    assert fits({**schema, "minContains": 3, "uniqueItems": False, "additionalItems": False}, [1, 1])


def test_prefix_items_hold_beside_additional_items():
    schema = {"type": "array", "prefixItems": [{"type": "integer"}], "additionalItems": False}
    assert fits(schema, [1, "x"])
    assert not fits(schema, ["x"])


def test_unique_items_are_accepted_with_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(structured_schema, "_warned", set())
    with caplog.at_level(logging.WARNING):
        for size in (3, 4):
            assert fits({"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}, "maxItems": size}, [1, 2])
    assert len([record for record in caplog.records if "uniqueItems" in record.getMessage()]) == 1


def test_unbounded_sizes_are_as_none():
    assert fits({"type": "string", "maxLength": 2**64, "minLength": 1.0}, "ab")


@pytest.mark.parametrize("name", ["type", "properties", "$ref", "enum", "const", "required", "uniqueItems", "format"])
def test_properties_may_have_the_names_of_keywords(name):
    schema = {"type": "object", "properties": {name: {"type": "integer", "maximum": 5}}, "required": [name]}
    assert fits(schema, {name: 5})
    assert not fits(schema, {name: "x"})
    assert fits({"const": {name: [1.0]}}, {name: [1]})


def test_names_of_maps():
    values = {"type": "object", "additionalProperties": {"type": "integer"}}
    schema = {**values, "propertyNames": {"$ref": "#/$defs/Name"}, "$defs": {"Name": {"enum": ["a", "b"]}}}
    assert fits(schema, {"b": 1})
    assert not fits(schema, {"c": 1})
    assert fits({**values, "propertyNames": {"minLength": 2}}, {"ab": 1})
    assert not fits({**values, "propertyNames": {"minLength": 2}}, {"a": 1})


OPTIONS = {
    "A": {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["x"]},
    "B": {"type": "object", "properties": {"kind": {"const": "b", "default": "b"}}},
}
REFERENCES = [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]


def test_options_told_apart_by_a_discriminator():
    schema = {"$defs": OPTIONS, "oneOf": REFERENCES, "discriminator": {"propertyName": "kind"}}
    assert fits(schema, {"kind": "a", "x": 1})
    assert fits(schema, {"kind": "b", "y": 1})
    for value in ({"kind": "a"}, {"x": 1}, {}):
        assert not fits(schema, value)


def test_options_that_may_overlap_are_refused():
    for options in (REFERENCES, [{"type": "number"}, {"type": "integer"}], [{"minimum": 1}, {"maximum": 2}]):
        with pytest.raises(ValueError, match="oneOf"):
            matcher(json={"$defs": OPTIONS, "oneOf": options})
    assert fits({"oneOf": [{"const": 1}, {"const": 2}, {"type": "string"}]}, 2)


PYDANTIC = {
    "properties": {
        "set": {"items": {"type": "integer"}, "type": "array", "uniqueItems": True},
        "path": {"format": "path", "type": "string"},
        "json": {"contentMediaType": "application/json", "contentSchema": {}, "type": "string"},
        "secret": {"format": "password", "type": "string", "writeOnly": True},
        "rate": {"exclusiveMinimum": 0, "maximum": 0.5, "type": "number"},
        "decimal": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]},
        "map": {"additionalProperties": {"type": "integer"}, "propertyNames": {"enum": ["a"]}, "type": "object"},
    }
}


def test_what_pydantic_writes_is_served():
    value = {"set": [1], "path": "/x", "json": "1", "secret": "s", "rate": 0.25, "decimal": "1.5", "map": {"a": 1}}
    assert fits(PYDANTIC, value)
    assert not fits(PYDANTIC, {"decimal": "+."})


# --- random schemas against a validator ---

numbers = st.sampled_from([0, 1, -1, 2, 5, -7, 0.5, -2.5, 1.25, 3.0, 99.99, 2**53, 2**53 + 3, 2**63 - 1, -(2**63), BIG])
values = st.sampled_from([1, 2, 0.5, -3, "a", "é\n", "", None, True, False, [1], [], {"a": 1}, {"b": "x"}])
keys = st.sampled_from(["a", "b", "type", "$ref", "é", "x y"])
leaves = st.one_of(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number", ["integer", "null"], ["number", "string"]])},
        optional={"minimum": numbers, "maximum": numbers, "exclusiveMinimum": numbers, "exclusiveMaximum": numbers},
    ),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "minLength": st.integers(0, 3),
            "maxLength": st.sampled_from([1, 3, 2**70]),
            "pattern": st.sampled_from(["^[a-c]+$", "a", "^x|y$", r"^\d{2,3}$", "(^a|b$)"]),
            "format": st.sampled_from(["foo", "uuid"]),
        },
    ),
    st.builds(lambda value: {"const": value}, values),
    st.builds(lambda options: {"enum": options}, st.lists(values, min_size=1, max_size=3)),
    st.just({"$ref": "#/$defs/D"}),
)


def nested(inner):
    some = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("array")},
            optional={
                "items": inner,
                "prefixItems": some,
                "minItems": st.integers(0, 2),
                "maxItems": st.integers(0, 3),
            },
        ),
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(keys, inner, max_size=3)},
            optional={
                "required": st.lists(keys, unique=True, max_size=2),
                "additionalProperties": st.one_of(st.just(False), inner),
                "minProperties": st.integers(0, 2),
                "maxProperties": st.integers(0, 3),
                "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$"]), inner, max_size=1),
                "unevaluatedProperties": st.just(False),
            },
        ),
        *(st.builds(lambda options, name=name: {name: options}, some) for name in ("anyOf", "oneOf", "allOf")),
    )


schemas = st.recursive(leaves, nested, max_leaves=6)


@given(schema=schemas, definition=leaves, seed=st.integers(0, 10**6), spaces=st.booleans())
@settings(max_examples=80, deadline=None)
def test_whatever_is_written_is_valid(schema, definition, seed, spaces):
    validators = pytest.importorskip("jsonschema_rs")
    whole = {**schema, "$defs": {"D": {"type": "string"} if "$ref" in definition else definition}}
    try:
        state = matcher(json=json.dumps(whole), disable_any_whitespace=not spaces)
    except (RequestError, ValueError):
        return
    validator = validators.Draft202012Validator(whole)
    for number in range(4):
        text, is_complete = sample(state, seed + number)
        assert not is_complete or validator.is_valid(json.loads(text)), (text, whole)
