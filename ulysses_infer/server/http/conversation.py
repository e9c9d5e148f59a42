"""Renders chat messages with the checkpoint's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ulysses_infer.errors import RequestError, first_line
from ulysses_infer.server.http.protocol.chat import Message

RESERVED = frozenset(
    {
        "conversation",
        "conversations",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
        "return_dict",
        "return_tensors",
        "padding",
        "truncation",
        "max_length",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
        "self",
    }
)


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template."""

    messages: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    opens_answer: bool = True
    """Whether the text ends with the opening of the assistant's turn."""
    continues: bool = False
    """Whether the last message is left open."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    num_characters: int = 0
    """Approximate amount of text."""


def conversation_of(body: Any, variables: Mapping[str, Any] | None = None) -> Conversation:
    """The conversation of a request with the fields of `ChatFields`. Raises `RequestError`."""
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError("continue_final_message and add_generation_prompt exclude each other; use one")
    given = {**(body.chat_template_kwargs or {}), **(variables or {})}
    clash = sorted(RESERVED.intersection(given))
    if clash:
        raise RequestError(f"chat_template_kwargs has {clash[0]!r}, which the server sets; leave it out")
    messages = [message_of(message) for message in body.messages]
    opens_answer = not body.continue_final_message and body.add_generation_prompt is not False
    return Conversation(
        messages,
        body.tools or None,
        body.documents or None,
        opens_answer,
        bool(body.continue_final_message),
        given,
        sum(len(message["content"]) for message in messages) + 1000 * len(body.tools or ()),
    )


def message_of(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text content, and call arguments as objects."""
    mapping = message.model_dump(exclude_none=True, exclude={"content", "tool_calls"})
    mapping["content"] = _text(message.content)
    if message.tool_calls:
        calls = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        for call in calls:
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        mapping["tool_calls"] = calls
    return mapping


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if content is None:
        return ""  # templates concatenate it with text
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if "text" in part else part["refusal"] for part in content)


def _arguments(text: str) -> Any:
    """The arguments as an object. Invalid JSON that a model once wrote stays text, because it is only history."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def render(tokenizer: Any, conversation: Conversation) -> str:
    """The prompt's text. Raises `RequestError` if there is no template or if it rejects the messages."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise RequestError("the checkpoint has no chat template; use /v1/completions or set server.chat_template")
    messages = _with_known_roles(conversation.messages, str(tokenizer.chat_template))
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=conversation.tools,
            documents=conversation.documents,
            tokenize=False,
            add_generation_prompt=conversation.opens_answer,
            continue_final_message=conversation.continues,
            **conversation.variables,
        )
    except Exception as error:  # a template is a program and may raise any exception
        raise RequestError(f"the chat template refuses these messages: {first_line(error)}") from error
    return str(text)


def _with_known_roles(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Renames the "developer" role to "system" unless the template knows it."""
    if "developer" in template:
        return messages
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
