"""Reasoning is separated from content, however the text is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.errors import ConfigError
from ulysses_infer.server.reasoning import FORMATS, ReasoningDelta, choose_reasoning
from ulysses_infer.server.tool_calls import ArgumentsDelta, CallStarted, ContentDelta
from ulysses_infer.server.tool_calls.pieces import tag_writer
from ulysses_infer.text.structured_pieces import alternatives_lark

HARMONY = "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>final<|message|>2"
CALL = (
    "<|channel|>analysis<|message|>I ask.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a":1}<|call|>'
)


def read(name, text, prompt="", cuts=None):
    """The reasoning, the content and the calls of an output that arrives in pieces."""
    parser = FORMATS[name].parser(prompt)
    pieces = list(text) if cuts is None else [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    names = [event.name for event in events if isinstance(event, CallStarted)]
    arguments = "".join(event.text for event in events if isinstance(event, ArgumentsDelta))
    return reasoning, content, names, arguments


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("qwen3", "", "<think>\nI add.\n</think>\n\n2", "I add.", "2"),
        ("qwen3", "", "2 < 3", "", "2 < 3"),
        ("qwen3", "", "<the>", "", "<the>"),
        ("qwen3", "[a]<think>\n", "I add.</think>2", "I add.", "2"),
        ("qwen3", "[a]<think>\n\n</think>\n\n", "\n2 </think>", "", "2 </think>"),
        ("qwen3", "", "<think>never ends </th", "never ends </th", ""),
        ("deepseek_r1", "", "I add.</think>2", "I add.", "2"),
        ("deepseek_r1", "", "<think>I add.</think>2", "I add.", "2"),
        ("glm45", "", "<think></think>2", "", "2"),
        ("mistral", "", "[THINK]a [/T b[/THINK]2", "a [/T b", "2"),
        ("openai_gptoss", "", HARMONY, "I add.", "2"),
        ("openai_gptoss", "", "2 and no markup", "", "2 and no markup"),
        ("openai_gptoss", "", HARMONY[: HARMONY.index("final")], "I add.", ""),
    ],
)
def test_reasoning_and_content_are_separated(name, prompt, text, reasoning, content):
    assert read(name, text, prompt) == read(name, text, prompt, []) == (reasoning, content, [], "")


def test_harmony_messages_to_functions_are_calls():
    assert read("openai_gptoss", CALL) == ("I ask.", "One moment.", ["now"], '{"a":1}')
    recipient_first = "<|channel|>analysis<|message|>x<|end|> to=functions.f<|channel|>commentary json<|message|>{}"
    assert read("openai_gptoss", recipient_first) == ("x", "", ["f"], "{}")


@given(st.sampled_from(["<think> a </think> b", HARMONY, CALL]), st.data())
def test_the_result_does_not_depend_on_how_the_text_is_cut(text, data):
    name = "qwen3" if text.startswith("<think>") else "openai_gptoss"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=8)))
    assert read(name, text, "", cuts) == read(name, text)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<think>' }} … </think>", "qwen3"),
        ("[gMASK]<sop> … </think>", "glm45"),
        ("[THINK] … [/THINK]", "mistral"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "openai_gptoss"),
        ("{{ message.content }}", None),
        (None, None),
    ],
)
def test_the_format_is_found_in_the_chat_template(template, name):
    found = choose_reasoning("auto", template)
    assert (None if found is None else found.name) == name


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(ConfigError, match=r"server.reasoning_parser 'qwen' is unknown; did you mean 'qwen3'"):
        choose_reasoning("qwen", None)
    assert choose_reasoning("none", "</think>") is None


def admits(name, prompt, text, special=()):
    """Whether a grammar of the format's prefix and a JSON object admits a text."""
    llguidance = pytest.importorskip("llguidance")
    tag = tag_writer({text: [1] for text in special})
    pieces = [*FORMATS[name].prefix(prompt, tag), {"json": {"type": "object"}}]
    grammar = alternatives_lark([pieces], json.dumps)
    tokens = [bytes([value]) for value in range(256)] + [b"<eos>"]
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(tokens)))
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


class _Bytes:
    """A tokenizer with one token per byte."""

    def __init__(self, tokens):
        self.tokens, self.eos_token_id, self.bos_token_id, self.special_token_ids = tokens, 256, None, [256]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("name", "prompt", "text", "is_admitted"),
    [
        ("qwen3", "", '<think>not {json</think>\n\n{"a": 1}', True),
        ("qwen3", "", '{"a": 1}', True),
        ("qwen3", "<think>", 'free</think>{"a": 1}', True),
        ("qwen3", "<think>", '{"a": 1}', False),
        ("qwen3", "<think></think>", '<think></think>{"a": 1}', False),
        ("deepseek_r1", "", 'free</think>{"a": 1}', True),
        ("openai_gptoss", "", HARMONY[:-1] + '{"a": 1}', True),
        ("openai_gptoss", "", '<|channel|>final<|message|>{"a": 1}', True),
        ("openai_gptoss", "", '{"a": 1}', False),
    ],
)
def test_a_constraint_applies_after_the_reasoning(name, prompt, text, is_admitted):
    assert admits(name, prompt, text) == is_admitted
