"""Renders chat messages with the checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ulysses_infer.errors import RequestError
from ulysses_infer.server.http.protocol.chat import Message
from ulysses_infer.text.chat_template import ChatTemplate

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


def conversation_of(
    body: Any, variables: Mapping[str, Any] | None = None, reasoning_key: str | None = None
) -> Conversation:
    """The conversation of a request with the fields of `ChatFields`. Raises `RequestError`.

    reasoning_key: where the chat template reads the reasoning of earlier messages.
    """
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError("continue_final_message and add_generation_prompt exclude each other; use one")
    given = {**(body.chat_template_kwargs or {}), **(variables or {})}
    clash = sorted(RESERVED.intersection(given))
    if clash:
        raise RequestError(f"chat_template_kwargs has {clash[0]!r}, which the server sets; leave it out")
    messages = [message_of(message, reasoning_key) for message in body.messages]
    opens_answer = not body.continue_final_message and body.add_generation_prompt is not False
    return Conversation(
        messages,
        body.tools or None,
        body.documents or None,
        opens_answer,
        bool(body.continue_final_message),
        given,
        sum(_num_characters(message["content"]) for message in messages) + 1000 * len(body.tools or ()),
    )


def message_of(message: Message, reasoning_key: str | None = None) -> dict[str, Any]:
    """A message of a request as a mapping, for the chat template."""
    mapping = message.model_dump(exclude_none=True, exclude={"content", "tool_calls"})
    if reasoning_key is not None and message.reasoning_content is not None:
        mapping.setdefault(reasoning_key, message.reasoning_content)
    mapping["content"] = message.content
    if message.tool_calls:
        mapping["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
    return mapping


def _num_characters(content: str | list[dict[str, Any]] | None) -> int:
    if isinstance(content, list):
        return sum(len(str(part.get("text", ""))) for part in content)
    return len(content or "")


def render(template: ChatTemplate, conversation: Conversation) -> str:
    """The prompt's text. Raises `RequestError` if there is no template or if it rejects the messages."""
    return template.render(
        conversation.messages,
        tools=conversation.tools,
        documents=conversation.documents,
        add_generation_prompt=conversation.opens_answer,
        continue_final_message=conversation.continues,
        **conversation.variables,
    )
