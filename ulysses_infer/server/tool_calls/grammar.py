"""The calls of each format as alternatives of a grammar, for outputs that are calls or match a response format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ulysses_infer.server.tool_calls.constraint import call_schema, parameters_schema
from ulysses_infer.server.tool_calls.definitions import function_of, parameters_of
from ulysses_infer.server.tool_calls.events import ToolFormat, Tools
from ulysses_infer.server.tool_calls.json_calls import DEEPSEEK_TAGS
from ulysses_infer.server.tool_calls.pieces import LINES, SPACE, Piece, Tag, some, tag_writer, text_piece, until
from ulysses_infer.server.tool_calls.values import is_text, property_schema

MAX_CALLS = 64


def calls_grammar(
    markup: ToolFormat, tools: Tools, special: Mapping[str, list[int]], parallel: bool
) -> list[list[Piece]] | None:
    """Alternatives for `StructuredOutputs.alternatives` that each are one or more calls; None for unknown formats.

    `special`: the special tokens among the tags, with their ids.
    """
    write = _FORMATS.get(markup.name)
    return None if write is None else write(tools, tag_writer(special), parallel)


def _listed(call: list[Piece], separator: list[Piece], parallel: bool) -> list[Piece]:
    """One call, or several with a separator."""
    return [{**some([call], 1, MAX_CALLS), "separator": separator}] if parallel else call


def _hermes(tools: Tools, tag: Tag, parallel: bool) -> list[list[Piece]]:
    calls = {"json": call_schema(tools, "arguments")}
    return [_listed([*tag("<tool_call>"), LINES, calls, LINES, *tag("</tool_call>")], [LINES], parallel)]


def _llama3_json(tools: Tools, tag: Tag, parallel: bool) -> list[list[Piece]]:
    calls = _listed([{"json": call_schema(tools, "parameters")}], [text_piece(";"), LINES], parallel)
    return [calls, [*tag("<|python_tag|>"), *calls]]


def _mistral(tools: Tools, tag: Tag, parallel: bool) -> list[list[Piece]]:
    opener = tag("[TOOL_CALLS]")
    items = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/_call"}}
    schema = call_schema(tools, "arguments")
    definitions = {**schema.pop("$defs"), "_call": schema}
    calls = {**items, "$defs": definitions, **({} if parallel else {"maxItems": 1})}
    named = [
        [*opener, text_piece(function_of(tool)["name"]), some([tag("[ARGS]")], 0), {"json": parameters_schema(tool)}]
        for tool in tools
    ]
    return [[*opener, SPACE, {"json": calls}], [some(named, 1, MAX_CALLS if parallel else 1)]]


def _deepseek(tools: Tools, tag: Tag, parallel: bool) -> list[list[Piece]]:
    first, begin, separator, end, last = (tag(text) for text in DEEPSEEK_TAGS)

    def calls(write: Callable[[Mapping[str, Any]], list[Piece]]) -> list[Piece]:
        each = [[*begin, *write(tool), *end] for tool in tools]
        return [*first, *_listed([some(each)], [LINES], parallel), *last]

    def plain(tool: Mapping[str, Any]) -> list[Piece]:
        return [text_piece(function_of(tool)["name"]), *separator, {"json": parameters_schema(tool)}]

    def fenced(tool: Mapping[str, Any]) -> list[Piece]:
        name = function_of(tool)["name"]
        schema = {"json": parameters_schema(tool)}
        return [text_piece("function"), *separator, text_piece(f"{name}\n```json\n"), schema, text_piece("\n```")]

    return [calls(plain), calls(fenced)]


def _pythonic(tools: Tools, tag: Tag, parallel: bool) -> list[list[Piece]]:
    separator = [text_piece(","), SPACE]
    each = [
        [text_piece(f"{function_of(tool)['name']}("), some(_keywords(tool, separator)), text_piece(")")]
        for tool in tools
        if re.fullmatch(r"[A-Za-z_][\w.-]*", function_of(tool)["name"])
    ]
    calls = [text_piece("["), *_listed([some(each)], separator, parallel), text_piece("]")]
    return [calls, [*tag("<|python_start|>"), *calls, *tag("<|python_end|>")]] if each else []


def _keywords(tool: Mapping[str, Any], separator: list[Piece]) -> list[list[Piece]]:
    """The arguments of a Python call in the schema's order."""
    parameters = parameters_of(tool)
    required = parameters.get("required") or ()
    keys = [key for key in parameters.get("properties") or {} if key.isidentifier()]
    items = [([text_piece(f"{key}="), _property(tool, key)], key in required) for key in keys]
    tails: list[list[Piece]] = [[]]  # what may follow another argument, from the last item on
    for item, is_required in reversed(items):
        tails.insert(0, [some([[*separator, *item]], int(is_required)), *tails[0]])
    found: list[list[Piece]] = []
    for position, (item, is_required) in enumerate(items):
        found.append([*item, *tails[position + 1]])
        if is_required:
            return found
    return [*found, []]


def _property(tool: Mapping[str, Any], key: str) -> Piece:
    """The value of one argument as JSON."""
    own = parameters_of(tool)["properties"][key]
    if '"$ref"' not in json.dumps(own):
        return {"json": own}
    schema = parameters_schema(tool)
    pointer = key.replace("~", "~0").replace("/", "~1").replace("%", "%25")
    reference = f"{schema['$ref']}/properties/{pointer}"
    return {"json": {"$ref": reference, "$defs": schema["$defs"]}}


def _qwen3_coder(tools: Tools, tag: Tag, parallel: bool) -> list[list[Piece]]:
    each = []
    for tool in tools:
        parameters = parameters_of(tool)
        body: list[Piece] = [*tag("<function="), text_piece(f"{function_of(tool)['name']}>\n")]
        for key in parameters.get("properties") or {}:
            value = [*tag("<parameter="), text_piece(f"{key}>\n"), *_tagged_value(tool, key, tag), text_piece("\n")]
            body.append(some([value], int(key in (parameters.get("required") or ()))))
        each.append([*body, *tag("</function>")])
    call = [*tag("<tool_call>"), text_piece("\n"), some(each), text_piece("\n"), *tag("</tool_call>")]
    return [_listed(call, [LINES], parallel)]


def _tagged_value(tool: Mapping[str, Any], key: str, tag: Tag) -> list[Piece]:
    parameters = parameters_of(tool)
    schema = property_schema(parameters, key, parameters)
    if is_text(schema, parameters):
        closing = tag("</parameter>")
        return [{"until": "\n</parameter>"}] if "text" in closing[0] else until(tag, "</parameter>")
    options = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(options, list) and options and all(isinstance(option, str) and option for option in options):
        return [some([[text_piece(option)] for option in options]), text_piece("\n"), *tag("</parameter>")]
    return [_property(tool, key), text_piece("\n"), *tag("</parameter>")]


_FORMATS: dict[str, Callable[[Tools, Tag, bool], list[list[Piece]]]] = {
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "deepseek": _deepseek,
    "pythonic": _pythonic,
    "qwen3_coder": _qwen3_coder,
}
