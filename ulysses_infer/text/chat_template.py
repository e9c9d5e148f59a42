"""Chat templates: found where checkpoints keep them, and rendered with content in the form that the template reads.

Templates read a message's content as text or as a list of parts, `[{"type": "text", "text": ...}]`. Those of models
with images often walk over parts, and given text they silently write nothing. So each template is tried once per role
in both forms.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ulysses_infer.errors import RequestError, first_line

PROBE, SECOND_PROBE = "ulysses-infer-probe", "ulysses-infer-end"
# How a template for text writes a list of parts: as Python or JSON.
PARTS_AS_TEXT = re.compile(rf"""text[\\'"]+:\s?[\\'"]+{PROBE}""")
OLD_PLACES = ("chat_template.json", "processor_config.json")  # a processor's files, which tokenizers do not read
MAX_FORMS = 64  # templates and roles whose forms are kept

Message = dict[str, Any]


class ContentForms(NamedTuple):
    """The forms of content that a template reads for one role."""

    text: bool
    parts: bool
    first_part_only: bool = False


def find_template(place: str | Path, revision: str | None) -> str | None:
    """The chat template of a tokenizer that has none, from the places where older processors keep it."""
    from transformers.utils.hub import cached_file

    for name in OLD_PLACES:
        path = cached_file(
            str(place),
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        template = _template_of(Path(path)) if path else None
        if template:
            return template
    return None


def _template_of(path: Path) -> str | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    template = values.get("chat_template") if isinstance(values, dict) else None
    return template if isinstance(template, str) else None


class ChatTemplate:
    """The chat template of a tokenizer. Build it once per tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._forms = functools.lru_cache(MAX_FORMS)(self._find_forms)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation's text. Raises `RequestError` without a template, or if it refuses the messages.

        variables: additional variables of the template; `chat_template` replaces the template itself.
        """
        template = variables.get("chat_template") or getattr(self._tokenizer, "chat_template", None)
        if not template:
            raise RequestError(
                "the checkpoint has no chat template; give a plain prompt, or set server.chat_template for a server"
            )
        options = {
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **variables,
        }
        key = (template if isinstance(template, str) else json.dumps(template), bool(tools))
        adapted = [self._adapted(message, key) for message in _with_known_roles(messages, key[0])]
        refusals: list[Exception] = []
        for attempt, render in self._attempts(adapted, key):
            try:
                return render(attempt, options)
            except Exception as error:  # a template is a program and may raise anything
                refusals.append(error)
        raise RequestError(f"the chat template refuses these messages: {first_line(refusals[-1])}") from refusals[-1]

    def _attempts(
        self, messages: list[Message], key: tuple[str, bool]
    ) -> Iterator[tuple[list[Message], Callable[[list[Message], dict[str, Any]], str]]]:
        """The messages as transformers renders them, then in forms for templates that raise on that: absent content
        as null or as empty text, arguments of calls as text."""
        yield messages, self._render
        in_text = [_with_arguments_in_text(message) for message in messages]
        if any("content" not in message for message in messages):
            yield [{"content": None, **message} for message in in_text], self._render_nulls
        if not all(message.get("content") for message in messages):
            yield [self._with_empty_content(message, key) for message in messages], self._render
        if any("tool_calls" in message for message in messages):
            yield [self._with_empty_content(message, key) for message in in_text], self._render

    def _render(self, messages: list[Message], options: dict[str, Any]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _render_nulls(self, messages: list[Message], options: dict[str, Any]) -> str:
        """As `apply_chat_template`, which drops keys whose value is null."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(options.get("chat_template"), options["tools"])
        variables = {**self._tokenizer.special_tokens_map, **options, "chat_template": template}
        rendered: Any = render_jinja_template([messages], **variables)
        return str(rendered[0][0])

    def _adapted(self, message: Message, key: tuple[str, bool]) -> Message:
        """The message with its content in a form that the template reads, and the arguments of calls as objects."""
        adapted = {name: value for name, value in message.items() if value is not None}
        if "content" in adapted:
            adapted["content"] = self._content(message, key)
        if isinstance(adapted.get("tool_calls"), list | tuple):
            adapted["tool_calls"] = [_with_arguments(call, _as_object) for call in adapted["tool_calls"]]
        return adapted

    def _content(self, message: Message, key: tuple[str, bool]) -> Any:
        content = message["content"]
        parts = _text_parts(content)
        forms = self._forms(str(message.get("role")), *key)
        if forms.parts and (isinstance(content, list | tuple) or not forms.text):
            if forms.first_part_only and len(parts) > 1:
                return [{"type": "text", "text": "\n".join(part["text"] for part in parts)}]
            return parts
        return "\n".join(part["text"] for part in parts)

    def _with_empty_content(self, message: Message, key: tuple[str, bool]) -> Message:
        if message.get("content"):
            return message
        forms = self._forms(str(message.get("role")), *key)
        return {**message, "content": "" if forms.text else [{"type": "text", "text": ""}]}

    def _find_forms(self, role: str, template: str, with_tools: bool) -> ContentForms:
        """The forms in which the text of a probe comes out of the template; text if it comes out of neither."""
        in_parts = [{"type": "text", "text": text} for text in (PROBE, SECOND_PROBE)]
        text = self._shown(role, PROBE, template, with_tools)
        parts = self._shown(role, in_parts, template, with_tools)
        if not text and not parts:
            return ContentForms(True, False)
        return ContentForms(bool(text), bool(parts), SECOND_PROBE not in parts)

    def _shown(self, role: str, content: Any, template: str, with_tools: bool) -> str:
        """A conversation with the content, as the template writes it; "" if the template does not read it."""
        options: dict[str, Any] = {"tools": [PROBE_TOOL]} if with_tools else {}
        if isinstance(getattr(self._tokenizer, "chat_template", None), str):
            options["chat_template"] = template  # it may be the request's own
        for conversation in _probe_conversations(role, content):
            try:
                text = self._render(conversation, options)
            except Exception:  # a template is a program and may raise anything; it does not read this form
                continue
            if PROBE in text and not PARTS_AS_TEXT.search(text):
                return text
        return ""


PROBE_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


def _probe_conversations(role: str, content: Any) -> Iterator[list[Message]]:
    """Short conversations with the content in a message of `role`, in forms that different templates accept."""
    for filler in ("x", [{"type": "text", "text": "x"}]):
        messages = _probe_conversation(role, content, filler)
        yield messages
        if role != "system":
            yield [{"role": "system", "content": filler}, *messages]


def _probe_conversation(role: str, content: Any, filler: Any) -> list[Message]:
    """A short conversation with the content in a message of `role`; other messages have the content `filler`."""
    user, probe = {"role": "user", "content": filler}, {"role": role, "content": content}
    if role == "user":
        return [probe]
    if role == "assistant":
        return [user, probe]
    if role in ("tool", "function"):
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
        caller = {"role": "assistant", "content": filler, "tool_calls": [call]}
        return [user, caller, {**probe, "name": "f", "tool_call_id": "call00000"}]
    return [probe, user]


def _with_arguments_in_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_arguments(call, _as_text) for call in calls]}


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of the call with changed arguments; anything without arguments as it is."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": change(function["arguments"])}}


def _as_object(arguments: Any) -> Any:
    """JSON as an object. Invalid JSON that a model once wrote stays text, because it is only history."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _text_parts(content: Any) -> list[dict[str, Any]]:
    """Content as a list of text parts. Raises `RequestError` for parts without text."""
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise RequestError(f"a message's content is text or a list of parts, not {type(content).__name__}")
    return [{"type": "text", "text": _part_text(part)} for part in content]


def _part_text(part: Any) -> str:
    text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"a content part of type {kind!r} has no text; this engine reads text only")
    return text


def _with_known_roles(messages: Sequence[Mapping[str, Any]], template: str) -> list[Message]:
    """Renames the "developer" role to "system" unless the template knows it."""
    listed = [dict(message) for message in messages]
    if "developer" in template:
        return listed
    return [{**message, "role": "system"} if message.get("role") == "developer" else message for message in listed]
