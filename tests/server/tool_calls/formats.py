"""Outputs as models write them, and what a parser makes of them."""

import itertools
import json
import string

from hypothesis import strategies as st

from ulysses_infer.server.tool_calls import FORMATS, ArgumentsDelta, CallStarted, ContentDelta, constrained_format


def tool(name, **properties):
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "x", "parameters": schema}}


TOOLS = [
    tool("get_weather", city={"type": "string"}, days={"type": "integer"}, more={}),
    tool("search", query={"type": "string"}, options={"type": "object"}, exact={"type": "boolean"}),
    tool("now"),
]


def feed(parser, text, cuts=()):
    """All events of `text` cut at `cuts`."""
    edges = [0, *sorted(cuts), len(text)]
    events = [event for start, end in itertools.pairwise(edges) for event in parser.push(text[start:end])]
    return events + parser.finish()


def joined(events):
    """(content, [(name, arguments)]), after checking that indices, ids and order are right."""
    content, calls, ids = "", [], set()
    for event in events:
        match event:
            case ContentDelta(text):
                assert text
                content += text
            case CallStarted(index, identifier, name):
                assert index == len(calls)
                ids.add(identifier)
                calls.append([name, ""])
            case ArgumentsDelta(index, text):
                assert text
                assert index == len(calls) - 1
                calls[-1][1] += text
    assert len(ids) == len(calls)
    return content, [tuple(call) for call in calls]


def parse(name, text, cuts=(), tools=TOOLS):
    chosen = constrained_format("required") if name == "required" else FORMATS[name]
    return joined(feed(chosen.parser(tools), text, cuts))


def decoded(calls):
    return [(name, json.loads(arguments)) for name, arguments in calls]


# --- what models write ---


def _object(call, key="arguments"):
    return json.dumps({"name": call[0], key: call[1]}, ensure_ascii=False)


def _python(value):
    return repr(value)


def _deepseek(calls):
    bar = "\uff5c"
    each = "".join(
        f"<{bar}tool▁call▁begin{bar}>{name}<{bar}tool▁sep{bar}>{json.dumps(arguments)}<{bar}tool▁call▁end{bar}>"
        for name, arguments in calls
    )
    return f"<{bar}tool▁calls▁begin{bar}>{each}<{bar}tool▁calls▁end{bar}>"


def _deepseek_v3(calls):
    bar = "\uff5c"
    each = "\n".join(
        f"<{bar}tool▁call▁begin{bar}>function<{bar}tool▁sep{bar}>{name}\n```json\n{json.dumps(arguments)}\n```"
        f"<{bar}tool▁call▁end{bar}>"
        for name, arguments in calls
    )
    return f"<{bar}tool▁calls▁begin{bar}>{each}<{bar}tool▁calls▁end{bar}>"


def _coder(calls):
    def value(given):
        return given if isinstance(given, str) else json.dumps(given)

    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{value(given)}\n</parameter>\n" for key, given in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in calls
    )


RENDER = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{_object(call)}\n</tool_call>" for call in calls),
    "llama3_json": lambda calls: "; ".join(_object(call, "parameters") for call in calls),
    "mistral": lambda calls: "[TOOL_CALLS] [" + ", ".join(_object(call) for call in calls) + "]",
    "mistral v11": lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(given)}" for name, given in calls),
    "pythonic": lambda calls: (
        "["
        + ", ".join(
            f"{name}(" + ", ".join(f"{key}={_python(value)}" for key, value in arguments.items()) + ")"
            for name, arguments in calls
        )
        + "]"
    ),
    "qwen3_coder": _coder,
    "deepseek": _deepseek,
    "deepseek v3": _deepseek_v3,
    "required": lambda calls: "[" + ", ".join(_object(call, "parameters") for call in calls) + "]",
}
BARE = ("llama3_json", "pythonic", "required")  # calls are the whole output, without an opener

# --- arbitrary ones ---

plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
pieces = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        "\n",
        " ",
        ";",
        ",",
        ":",
        "(",
        ")",
        "=",
        "get_weather",
        '{"name": "now", "arguments": {',
        '{"name": "search", "parameters": {"query": "',
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "<function=now>",
        "<parameter=query>",
        "</parameter>",
        "</function>",
        "[now(",
        "search(query='",
        "<\uff5ctool▁call▁begin\uff5c>",
        "now<\uff5ctool▁sep\uff5c>{}",
        "'",
        "1",
        "a",
        "é",
        "```",
    ]
)
odd_text = st.lists(st.one_of(pieces, pieces, plain_text), max_size=14).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | plain_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3),
    max_leaves=5,
)
weather = st.fixed_dictionaries({}, optional={"city": plain_text, "days": st.integers(-(10**9), 10**9)}).map(
    lambda arguments: ("get_weather", arguments)
)
searching = st.fixed_dictionaries(
    {},
    optional={
        "query": plain_text,
        "exact": st.booleans(),
        "options": st.dictionaries(st.text(string.ascii_letters, max_size=4), json_values, max_size=3),
    },
).map(lambda arguments: ("search", arguments))
calls_lists = st.lists(weather | searching | st.just(("now", {})), min_size=1, max_size=3)
