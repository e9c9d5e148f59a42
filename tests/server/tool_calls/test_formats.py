"""Every format: calls come back as they were written, however the text is cut, and nothing else is lost."""

import json

import pytest
from formats import BARE, RENDER, TOOLS, calls_lists, decoded, feed, joined, odd_text, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.server.tool_calls import FORMATS, ArgumentsDelta, CallStarted, ContentDelta, constrained_format

RENDERED = sorted(RENDER)
NAMES = [*sorted(FORMATS), "required"]
CALLS = [("get_weather", {"city": 'Zürich "x" </tool> \n', "days": 3}), ("now", {}), ("search", {"query": "a; b"})]


def base(name):
    return name.split()[0]


@pytest.mark.parametrize("name", RENDERED)
@given(calls=calls_lists, data=st.data())
@settings(max_examples=60, deadline=None)
def test_rendered_calls_are_parsed_however_they_are_cut(name, calls, data):
    text = RENDER[name](calls)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    content, found = parse(base(name), text, cuts)
    assert decoded(found) == calls
    assert content == ""


@pytest.mark.parametrize("name", NAMES)
@given(text=odd_text, data=st.data())
@settings(max_examples=150, deadline=None)
def test_cuts_change_nothing_and_no_text_is_lost(name, text, data):
    whole = parse(name, text)
    assert parse(name, text, range(len(text))) == whole
    assert parse(name, text, data.draw(st.lists(st.integers(0, len(text)), max_size=5))) == whole
    content, calls = whole
    if not calls:
        assert content == text
    rest = iter(text)
    assert all(character in rest for character in content), "content is made of the text's characters, in order"


@pytest.mark.parametrize("name", [name for name in RENDERED if name not in BARE])
def test_text_before_and_after_calls_is_content(name):
    content, calls = parse(base(name), f"Let me see.\n{RENDER[name](CALLS)}\n\n Done. ")
    assert decoded(calls) == CALLS
    assert content == "Let me see.\n\n\n Done. "


@pytest.mark.parametrize("name", RENDERED)
def test_white_space_around_calls_is_not_content(name):
    content, calls = parse(base(name), f"\n {RENDER[name](CALLS)} \n")
    assert decoded(calls) == CALLS
    assert content == ""


@pytest.mark.parametrize("name", [name for name in RENDERED if name != "required"])
def test_markup_is_never_shown_while_calls_stream(name):
    parser = FORMATS[base(name)].parser(TOOLS)
    seen = [event for character in RENDER[name](CALLS) for event in parser.push(character)]
    assert not [event for event in seen if isinstance(event, ContentDelta)]
    assert decoded(joined(seen + parser.finish())[1]) == CALLS


@pytest.mark.parametrize("name", [name for name in RENDERED if base(name) != "pythonic"])
def test_arguments_stream_as_they_come(name):
    text = RENDER[name]([("search", {"query": "x" * 500})])
    chosen = FORMATS.get(base(name)) or constrained_format("required")
    parser = chosen.parser(TOOLS)
    deltas = [e for character in text for e in parser.push(character) if isinstance(e, ArgumentsDelta)]
    assert len(deltas) > 500
    assert json.loads("".join(delta.text for delta in deltas)) == {"query": "x" * 500}


@pytest.mark.parametrize("name", RENDERED)
def test_an_output_cut_short_keeps_the_call_it_began(name):
    text = RENDER[name]([("search", {"query": "abc def"})])
    content, calls = parse(base(name), text[: text.index("def")])
    if base(name) == "pythonic":
        assert content == text[: text.index("def")]
    else:
        assert content == ""
        assert calls[0][0] == "search"
        assert calls[0][1].endswith("abc ")


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "required"])
def test_keys_in_another_order_and_arguments_as_text_are_read_too(name):
    for call in (
        {"arguments": {"days": 1}, "name": "get_weather"},
        {"name": "get_weather", "arguments": '{"days": 1}'},
    ):
        written = json.dumps(call)
        text = {"hermes": f"<tool_call>{written}</tool_call>", "llama3_json": written}.get(name, f"[{written}]")
        content, calls = parse(name, "[TOOL_CALLS]" + text if name == "mistral" else text)
        assert (content, decoded(calls)) == ("", [("get_weather", {"days": 1})])


MALFORMED = {
    "hermes": [
        "<tool_call>",
        "<tool_call>{oops}</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>\n{"name": 3, "arguments": {}}',
        "a < b <tool_cal",
        '<tool_call>{"name": "f", "arguments": {x}}',
    ],
    "llama3_json": [
        '{"name": "unknown", "parameters": {}}',
        '{"name": "now"}',
        '{"city": "Bern"}',
        "{",
        "<|python_tag|>x = 1",
    ],
    "mistral": ["[TOOL_CALLS] oops", "[TOOL_CALLS][1]", "[TOOL_CALL", "[TOOL_CALLS]now[ARGS]7"],
    "pythonic": [
        "[1, 2]",
        "[unknown(a=1)]",
        "[now(1)]",
        "[now(a=b)]",
        "[now(",
        "[now(**x)]",
        "[now(a=1/2)]",
        "[now(a=f(1))]",
    ],
    "qwen3_coder": ["<tool_call>\nhello", "<function=", "<function=a b>"],
    "deepseek": ["<\uff5ctool▁calls▁begin\uff5c>no", "<\uff5ctool▁call▁begin\uff5c>now"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in MALFORMED.items() for text in texts])
def test_text_that_is_not_a_call_stays_content(name, text):
    assert parse(name, text) == (text, [])
    assert parse(name, text, range(len(text))) == (text, [])


def test_a_call_after_a_malformed_one_is_found():
    good = RENDER["hermes"]([("now", {})])
    assert parse("hermes", f"<tool_call>oops</tool_call>{good}") == ("<tool_call>oops</tool_call>", [("now", "{}")])


def test_a_missing_end_of_the_object_is_forgiven():
    assert parse("hermes", '<tool_call>{"name": "now", "arguments": {}</tool_call>') == ("", [("now", "{}")])


def test_llama_calls_may_follow_the_python_tag():
    text = '<|python_tag|>{"name": "now", "parameters": {}}'
    assert parse("llama3_json", text) == ("", [("now", "{}")])
    assert parse("llama3_json", "I look it up. " + text) == ("I look it up. ", [("now", "{}")])


def test_llama_4_calls_may_stand_in_tags():
    assert parse("pythonic", "<|python_start|>[now()]<|python_end|>") == ("", [("now", "{}")])


def test_mistral_ids_have_nine_characters_and_its_own_are_kept():
    parser = FORMATS["mistral"].parser(TOOLS)
    events = feed(parser, '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{"a": 1}')
    ids = [event.id for event in events if isinstance(event, CallStarted)]
    assert len(ids[0]) == 9
    assert ids[0].isalnum()
    assert ids[1] == "abcdefghi"
    first = feed(FORMATS["hermes"].parser([]), RENDER["hermes"]([("f", {})]))[0]
    assert first.id.startswith("call_")


def test_the_schema_gives_the_type_of_a_parameters_text():
    text = (
        "<function=search><parameter=query>\n12\n</parameter><parameter=exact>True</parameter>"
        '<parameter=options>\n{"a": [1]}\n</parameter><parameter=unknown>1</parameter></function>'
    )
    _, calls = parse("qwen3_coder", text)
    assert decoded(calls) == [("search", {"query": "12", "exact": True, "options": {"a": [1]}, "unknown": "1"})]


def test_python_and_json_names_of_constants_are_both_read():
    _, calls = parse("pythonic", "[search(exact=true, options={'a': None, 'b': -1.5, 'c': (1, [2])})]")
    assert decoded(calls) == [("search", {"exact": True, "options": {"a": None, "b": -1.5, "c": [1, [2]]}})]


HOSTILE = [
    "[now(a=" + "(" * 5000 + ")" * 5000 + ")]",
    "[now(a=" + "-" * 100_000 + "1)]",
    "[now(a=" + "9" * 10_000 + ")]",
    "[now(a=" + "[" * 300 + "]" * 300 + ")]",
    '[now(a="\\ud800")]',
    '<tool_call>{"arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + '}, "name": "now"}</tool_call>',
    '<tool_call>{"arguments": {"a": 1e999}, "name": "now"}</tool_call>',
    '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "now"}</tool_call>',
    '<tool_call>{"arguments": {}, "name": "\\ud800"}</tool_call>',
    "<tool_call>" * 3000,
    "[TOOL_CALLS]" + " " * 10_000,
    '<tool_call>{"name": "' + "a" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", NAMES)
def test_hostile_text_neither_raises_nor_stalls(name, text):
    content, calls = parse(name, text, range(0, len(text), 7))
    content.encode()
    assert all(arguments.encode() for _, arguments in calls)
    assert calls or content == text
