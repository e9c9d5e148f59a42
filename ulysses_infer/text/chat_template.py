"""Chat templates: found where checkpoints keep them, and rendered with content in the form that the template reads.

Templates read a message's content as text or as a list of parts, `[{"type": "text", "text": ...}]`. Those of models
with images often walk over parts, and given text they silently write nothing. So each template is tried once per role
in both forms.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ulysses_infer.errors import RequestError, first_line

PROBE = "ulysses-infer-probe"
PARTS_AS_TEXT = (f"'text': '{PROBE}'", f'"text": "{PROBE}"')  # how a template for text writes a list of parts
OLD_PLACES = ("chat_template.json", "processor_config.json")  # a processor's files, which tokenizers do not read
MAX_FORMS = 64  # templates and roles whose forms are kept

Message = dict[str, Any]
Rendering = Callable[[list[Message]], str]


class ContentForms(NamedTuple):
    """The forms of content that a template reads for one role."""

    text: bool
    parts: bool


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
        options = {"tools": tools, "documents": documents, **variables}
        key = (template if isinstance(template, str) else json.dumps(template), bool(tools))
        adapted = [
            {**message, "content": self._content(message, key)} for message in _with_known_roles(messages, key[0])
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                adapted,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **options,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise RequestError(f"the chat template refuses these messages: {first_line(error)}") from error
        return str(text)

    def _content(self, message: Message, key: tuple[str, bool]) -> Any:
        """The message's content in a form that the template reads."""
        content = message.get("content")
        parts = _text_parts(content)
        forms = self._forms(str(message.get("role")), *key)
        if isinstance(content, list | tuple) and forms.parts:
            return parts
        if forms.parts and not forms.text:
            return parts
        return "\n".join(part["text"] for part in parts)

    def _find_forms(self, role: str, template: str, with_tools: bool) -> ContentForms:
        """The forms in which the text of a probe comes out of the template; text if it comes out of neither."""
        in_parts = [{"type": "text", "text": PROBE}]
        found = ContentForms(
            self._shows(role, PROBE, template, with_tools), self._shows(role, in_parts, template, with_tools)
        )
        return found if any(found) else ContentForms(True, False)

    def _shows(self, role: str, content: Any, template: str, with_tools: bool) -> bool:
        options: dict[str, Any] = {"tools": [PROBE_TOOL]} if with_tools else {}
        if isinstance(getattr(self._tokenizer, "chat_template", None), str):
            options["chat_template"] = template  # it may be the request's own
        for filler in ("x", [{"type": "text", "text": "x"}]):
            conversation = _probe_conversation(role, content, filler)
            try:
                text = str(self._tokenizer.apply_chat_template(conversation, tokenize=False, **options))
            except Exception:  # a template is a program and may raise anything; it does not read this form
                continue
            if PROBE in text and not any(written in text for written in PARTS_AS_TEXT):
                return True
        return False


PROBE_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


def _probe_conversation(role: str, content: Any, filler: Any) -> list[Message]:
    """A short conversation with the content in a message of `role`; other messages have the content `filler`."""
    user, probe = {"role": "user", "content": filler}, {"role": role, "content": content}
    if role == "user":
        return [probe]
    if role == "assistant":
        return [user, probe]
    if role == "tool":
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
        caller = {"role": "assistant", "content": filler, "tool_calls": [call]}
        return [user, caller, {**probe, "name": "f", "tool_call_id": "call00000"}]
    return [probe, user]


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
