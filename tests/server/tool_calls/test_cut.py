"""Outputs that end at the limit of their length, at every place."""

import pytest
from formats import RENDER, TOOLS, decoded, joined

from ulysses_infer.server.tool_calls import FORMATS, constrained_format

CALLS = [("get_weather", {"city": "Bern", "days": 3}), ("now", {}), ("search", {"query": "a; b"})]
BARE = ("llama3_json", "pythonic", "required")


def base(name):
    return name.split()[0]


def read(name, text, is_cut):
    chosen = FORMATS.get(base(name)) or constrained_format("required")
    parser = chosen.parser(TOOLS)
    events = parser.push(text)
    return joined(events + parser.finish(is_cut))


@pytest.mark.parametrize("name", sorted(RENDER))
def test_complete_calls_are_given_and_no_markup_is_shown(name):
    text = RENDER[name](CALLS)
    for length in range(len(text) + 1):
        content, calls = read(name, text[:length], is_cut=True)
        assert not content or (base(name) in BARE and not calls) or text.startswith(content), text[:length]
        assert [call[0] for call in calls] == [call[0] for call in CALLS][: len(calls)]
        assert decoded(calls[:-1]) == CALLS[: len(calls)][:-1]
        if calls:
            assert content == ""
    assert decoded(calls) == CALLS


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek", "qwen3_coder"])
def test_the_start_of_a_call_is_content_only_if_the_output_was_not_cut(name):
    text = "Well. " + RENDER[name](CALLS)
    end = text.index("get_weather") + 3
    assert read(name, text[:end], is_cut=True) == ("Well. ", [])
    assert read(name, text[:end], is_cut=False) == (text[:end], [])
    assert read(name, "a < b <tool", is_cut=True) == ("a < b <tool", [])
