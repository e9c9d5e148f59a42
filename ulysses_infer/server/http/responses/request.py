"""A request of the Responses API as a chat request."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.protocol.chat import ChatRequest
from ulysses_infer.server.http.protocol.responses import INCLUDES, LOGPROBS, PARTS, ResponsesRequest

Item = dict[str, Any]
SAME = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "priority",
    "cache_salt",
    "prompt_cache_key",
    "chat_template_kwargs",
    "parallel_tool_calls",
)
"""Fields that both APIs have."""


def input_items(body: ResponsesRequest) -> list[Item]:
    """The input as items with ids."""
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    return [{"id": f"item_{uuid.uuid4().hex}", "type": "message", **item} for item in items]


def chat_request(body: ResponsesRequest, items: Sequence[Item]) -> ChatRequest:
    """The chat request of the same meaning. items: those of earlier responses, then the input. Raises `ApiError`."""
    for name in body.include or ():
        if name not in INCLUDES:
            raise ApiError(400, f"include has {name[:80]!r}; use {' or '.join(INCLUDES)}", param="include")
    fields: dict[str, Any] = {name: getattr(body, name) for name in SAME}
    has_logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or ())
    fields |= {
        "messages": chat_messages(body.instructions, items),
        "max_tokens": body.max_output_tokens,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "response_format": _response_format(body),
        "logprobs": has_logprobs or None,
        "top_logprobs": body.top_logprobs if has_logprobs else None,
    }
    if body.tools:
        fields |= {"tools": [_tool(tool) for tool in body.tools], "tool_choice": _tool_choice(body.tool_choice)}
    return ChatRequest.model_validate(fields)


def chat_messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as chat messages. What the assistant thought, said and called between two turns is one message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    answer: dict[str, Any] | None = None
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
        elif kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _text(item["content"])})
        else:
            if answer is None or answer is not messages[-1]:
                answer = {"role": "assistant", "content": ""}
                messages.append(answer)
            _add(answer, item)
    return messages


def _add(answer: dict[str, Any], item: Item) -> None:
    """Add an item to the assistant's message."""
    if item["type"] == "message":
        answer["content"] += _text(item["content"])
    elif item["type"] == "reasoning":
        parts = item.get("content") or item.get("summary") or ()
        answer["reasoning_content"] = answer.get("reasoning_content", "") + "".join(part["text"] for part in parts)
    else:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        answer.setdefault("tool_calls", []).append(call)


def _text(content: str | Sequence[Item]) -> str:
    return content if isinstance(content, str) else "\n".join(part[PARTS[part["type"]]] for part in content)


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    if wanted.schema_ is None:
        raise ApiError(400, "text.format has no schema; give one or use type json_object", param="text.format")
    return {"type": "json_schema", "json_schema": {"name": wanted.name, "schema": wanted.schema_}}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        message = f"tools has one of type {str(tool.get('type'))[:40]!r}; this server runs no tools, so use functions"
        raise ApiError(400, message, param="tools")
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key not in ("type", "strict")},
    }


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        names = [{"type": "function", "function": {"name": tool.get("name")}} for tool in choice.get("tools") or ()]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": names}}
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}
