"""Formats by name and from chat templates; definitions, choices and what they demand."""

import json
import random

import pytest
from formats import RENDER, TOOLS, decoded, feed, joined, tool

from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.server.tool_calls import (
    FORMATS,
    check_tool_choice,
    check_tools,
    choose_format,
    constrained_format,
    tool_choice_constraint,
)
from ulysses_infer.text.structured import GrammarCompiler, check

TEMPLATES = {
    "hermes": '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args>}\\n</tool_call>',
    "qwen3_coder": "{{ '<tool_call>\\n<function=' + tool_call.name + '>\\n' }}{{ '<parameter=' + args_name + '>\\n' }}",
    "mistral": '{{- "[TOOL_CALLS] [" }}{{ \'{"name": \' }}{{ \'"arguments": \' }}',
    "llama3_json": (
        '{%- if tools is not none %}Respond in the format {"name": function name, "parameters": dictionary of '
        "argument name and its value}.{% endif %}<|eot_id|>"
    ),
    "pythonic": "in the format of [func_name1(params_name1=params_value1...)]<|eot_id|>",
    "deepseek": "{{'<\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>' + tool['type']}}",
}
NONE = [
    None,
    "",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "<tool_call>{{ name }}<arg_key>arguments</arg_key>",
]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_format_is_detected_from_the_chat_template(name):
    assert choose_format("auto", TEMPLATES[name]).name == name
    assert choose_format(name, None) is FORMATS[name]


@pytest.mark.parametrize("template", NONE)
def test_a_template_without_calls_has_no_format(template):
    assert choose_format("auto", template) is None
    assert choose_format("none", TEMPLATES["hermes"]) is None


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        choose_format("hermse", None)
    with pytest.raises(ConfigError, match="use one of auto, none"):
        choose_format("zzz", None)


def test_every_format_names_the_markup_that_may_be_special_tokens():
    assert all(known.tags for known in FORMATS.values())


# --- definitions ---

WRONG_TOOLS = [
    "x",
    {"a": 1},
    [1],
    [{}],
    [{"type": "function"}],
    [{"type": "retrieval", "function": {"name": "f"}}],
    [{"function": {"name": ""}}],
    [{"function": {"name": "a b"}}],
    [{"function": {"name": "a" * 65}}],
    [{"function": {"name": 3}}],
    [{"function": {"name": "f", "description": 3}}],
    [{"function": {"name": "f", "parameters": []}}],
    [{"function": {"name": "f", "parameters": {"type": "array"}}}],
    [{"function": {"name": "f", "parameters": {"properties": []}}}],
    [{"function": {"name": "f", "parameters": {"properties": {"a": 3}}}}],
    [{"function": {"name": "f", "parameters": {"required": "a"}}}],
    [tool("f"), tool("f")],
    [tool(f"f{index}") for index in range(600)],
]


@pytest.mark.parametrize("tools", WRONG_TOOLS, ids=range(len(WRONG_TOOLS)))
def test_wrong_definitions_are_refused_in_one_line(tools):
    with pytest.raises(RequestError) as caught:
        check_tools(tools)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_right_definitions_and_choices_pass():
    check_tools(TOOLS)
    check_tools([{"type": "function", "function": {"name": "f", "parameters": None, "description": None}}])
    for choice in (None, "none", "auto", "required", named("now")):
        check_tool_choice(choice, TOOLS)
    check_tool_choice("auto", None)


def named(name):
    return {"type": "function", "function": {"name": name}}


WRONG_CHOICES = [
    "any",
    3,
    [],
    {},
    {"type": "function"},
    {"type": "x", "function": {"name": "now"}},
    named("then"),
    named(3),
]


@pytest.mark.parametrize("choice", WRONG_CHOICES, ids=str)
def test_wrong_choices_are_refused_in_one_line(choice):
    with pytest.raises(RequestError) as caught:
        check_tool_choice(choice, TOOLS)
    assert "\n" not in str(caught.value)


def test_required_without_tools_is_refused():
    for tools in (None, []):
        with pytest.raises(RequestError, match="no tools"):
            check_tool_choice("required", tools)


# --- constraints ---


class Characters:
    """A tokenizer of single characters, as `GrammarCompiler` sees it."""

    all_special_ids = ()
    added_tokens_decoder = {}  # noqa: RUF012

    def get_vocab(self):
        return {chr(code): code for code in range(32, 127)}

    def decode(self, token_ids, **options):
        return "".join(map(chr, token_ids))


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(Characters(), 130)


def accepts(compiler, wanted, text):
    state, token_ids = compiler.state(wanted, ()), [ord(character) for character in text]
    fits = all(token in state.mask(token_ids[:index]).token_ids() for index, token in enumerate(token_ids))
    if fits:
        state.mask(token_ids)
    return fits and state.may_end


def write(compiler, wanted, seed, limit=4000):
    """A random text that the constraint allows, given to stop as soon as it may."""
    state, chosen, token_ids = compiler.state(wanted, ()), random.Random(seed), []
    while len(token_ids) < limit:
        allowed = state.mask(token_ids).token_ids().tolist()
        if state.may_end:
            return "".join(map(chr, token_ids))
        closing = [token for token in allowed if chr(token) in '"]}']
        token_ids.append(chosen.choice(closing if closing and chosen.random() < 0.3 else allowed))
    pytest.fail("no end")


def test_choices_that_demand_nothing_constrain_nothing():
    assert all(tool_choice_constraint(TOOLS, choice) is None for choice in (None, "none", "auto"))


STRICT = [
    tool("get_weather", city={"enum": ["Bern", "Rome"]}, days={"type": "integer", "minimum": 0, "maximum": 9}),
    {"type": "function", "function": {"name": "now"}},
]
for part in STRICT[:1]:
    part["function"]["parameters"] |= {"required": ["city"], "additionalProperties": False}


@pytest.mark.parametrize("parallel", [True, False])
def test_required_gives_calls_of_the_tools_and_nothing_else(compiler, parallel):
    wanted = tool_choice_constraint(STRICT, "required", parallel)
    check(wanted)
    for seed in range(10):
        content, calls = joined(feed(constrained_format("required").parser(STRICT), write(compiler, wanted, seed)))
        assert content == ""
        assert calls
        assert len(calls) == 1 or parallel
        for name, arguments in decoded(calls):
            assert name in ("get_weather", "now")
            assert set(arguments) <= ({"city", "days"} if name == "get_weather" else set())
    two = RENDER["required"]([("now", {}), ("get_weather", {"city": "Rome"})])
    assert accepts(compiler, wanted, two) is parallel
    assert not accepts(compiler, wanted, "[]")
    assert not accepts(compiler, wanted, RENDER["required"]([("get_weather", {"city": "Oslo"})]))
    assert not accepts(compiler, wanted, RENDER["required"]([("then", {})]))


def test_a_named_function_gives_its_arguments_alone(compiler):
    wanted = tool_choice_constraint(STRICT, named("get_weather"))
    text = write(compiler, wanted, 1)
    events = feed(constrained_format(named("get_weather")).parser(STRICT), text, range(len(text)))
    assert joined(events) == ("", [("get_weather", text)])
    assert json.loads(text)["city"] in ("Bern", "Rome")
    assert constrained_format(named("get_weather")).parser(STRICT).finish() == []


def test_references_inside_a_tools_schema_still_resolve(compiler):
    tree = {
        "type": "object",
        "$defs": {"leaf": {"type": "integer"}},
        "properties": {"left": {"$ref": "#"}, "value": {"$ref": "#/$defs/leaf"}, "$ref": {"const": "#/$defs/leaf"}},
        "required": ["value"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "grow", "parameters": tree}}, tool("now")]
    wanted = tool_choice_constraint(tools, "required")
    good = {"left": {"left": {"value": 1}, "value": 2}, "value": 3}
    assert accepts(compiler, wanted, RENDER["required"]([("grow", good)]))
    assert not accepts(compiler, wanted, RENDER["required"]([("grow", {"value": "x"})]))
    assert not accepts(compiler, wanted, RENDER["required"]([("grow", {"left": {}, "value": 3})]))
