"""A request of Anthropic's API as a chat request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.protocol.chat import ChatRequest
from ulysses_infer.server.http.protocol.messages import InputMessage, MessagesRequest, PromptFields

Block = dict[str, Any]


def chat_request(body: PromptFields) -> ChatRequest:
    """The chat request of the same meaning. Raises `ApiError`."""
    messages = [message for turn in body.messages for message in _chat_messages(turn)]
    if body.system:
        messages.insert(0, {"role": "system", "content": _text(body.system)})
    wanted: dict[str, Any] = {"model": body.model, "messages": messages, "chat_template_kwargs": _variables(body)}
    if body.messages[-1].role == "assistant":
        wanted["continue_final_message"] = True
    wanted |= _tools(body) | _output(body)
    if isinstance(body, MessagesRequest):
        wanted |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences or None,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "ignore_eos": body.ignore_eos,
        }
    return ChatRequest.model_validate(wanted)


def _chat_messages(turn: InputMessage) -> Iterator[dict[str, Any]]:
    """One turn as chat messages: results of tools have messages of their own."""
    blocks: Sequence[Block] = (
        [{"type": "text", "text": turn.content}] if isinstance(turn.content, str) else turn.content
    )
    if turn.role == "assistant":
        yield _answer(blocks)
        return
    for block in blocks:
        if block["type"] == "tool_result":
            content = _text(block.get("content") or "")
            yield {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}
    texts = _texts(blocks)
    if texts:
        yield {"role": "user", "content": "\n".join(texts)}


def _answer(blocks: Sequence[Block]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(_texts(blocks))}
    thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": json.dumps(block["input"], ensure_ascii=False)},
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return {**message, "tool_calls": calls} if calls else message


def _texts(blocks: Sequence[Block]) -> list[str]:
    return [block["text"] for block in blocks if block["type"] == "text"]


def _text(content: str | Sequence[Block]) -> str:
    return content if isinstance(content, str) else "\n".join(_texts(content))


def _tools(body: PromptFields) -> dict[str, Any]:
    tools = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
        }
        for tool in body.tools or ()
    ]
    if not tools:
        return {}
    choice = body.tool_choice
    if choice is None:
        return {"tools": tools}
    if choice.type == "tool" and choice.name is None:
        raise ApiError(400, "tool_choice of type tool has no name; name the tool", param="tool_choice")
    named = {"type": "function", "function": {"name": choice.name}}
    wanted = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
    return {"tools": tools, "tool_choice": wanted, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _output(body: PromptFields) -> dict[str, Any]:
    config = body.output_config
    fields: dict[str, Any] = {}
    if config is not None and config.effort is not None:
        fields["reasoning_effort"] = config.effort
    if config is not None and config.format is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": config.format.schema_}}
    return fields


def _variables(body: PromptFields) -> dict[str, Any]:
    """Variables of the chat template: both names that templates have for thinking, if the request says anything."""
    given = dict(body.chat_template_kwargs or {})
    if body.thinking is None or body.thinking.type == "adaptive":
        return given
    is_on = body.thinking.type == "enabled"
    return {"enable_thinking": is_on, "thinking": is_on, **given}
