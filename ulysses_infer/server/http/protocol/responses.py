"""Types of /v1/responses, OpenAI's API for agents."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from ulysses_infer.sampling_params import (
    MIN_P_RANGE,
    PENALTY_RANGE,
    REPETITION_PENALTY_RANGE,
    SEED_RANGE,
    TEMPERATURE_RANGE,
    TOP_K_RANGE,
    TOP_P_RANGE,
)
from ulysses_infer.server.http.protocol.common import (
    INT32,
    MAX_LOGPROBS,
    Body,
    Count,
    ResponseBody,
    Stops,
    StreamOptions,
    above,
    between,
)

ITEMS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "message": {"role": str, "content": (str, list)},
    "function_call": {"call_id": str, "name": str, "arguments": str},
    "function_call_output": {"call_id": str, "output": (str, list)},
    "reasoning": {"summary": (list, type(None)), "content": (list, type(None))},
}
"""The items that this server reads, and the fields each must have."""
PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
THOUGHTS = {"reasoning_text": "text", "summary_text": "text"}
ROLES = ("system", "developer", "user", "assistant")
LOGPROBS = "message.output_text.logprobs"
INCLUDES = (LOGPROBS, "reasoning.encrypted_content")


def check_input(value: Any) -> Any:
    """Text or items. Raises ValueError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("should be a text or a list of items")
    for item in value:
        _check_item(item)
    return value


def _check_item(item: Any) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(kind, str) or kind not in ITEMS:
        raise ValueError(f"has an item of type {kind}; this server reads {', '.join(ITEMS)}")
    for name, of in ITEMS[kind].items():
        if not isinstance(item.get(name), of):
            raise ValueError(f"has an item of type {kind} whose {name} is missing or of a wrong type")
    if kind == "message" and item["role"] not in ROLES:
        raise ValueError(f"has a message with the role {item['role']!r}; use one of {', '.join(ROLES)}")
    known = THOUGHTS if kind == "reasoning" else PARTS
    for name in ("content", "output", "summary"):
        _check_parts(item.get(name) or (), known)


def _check_parts(parts: Any, known: dict[str, str]) -> None:
    if isinstance(parts, str):
        return
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in known or not isinstance(part.get(known[kind]), str):
            raise ValueError(f"has a part of type {kind}; the model reads only text")


Input = Annotated[
    str | list[dict[str, Any]],
    PlainValidator(check_input),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"role": {"enum": list(ROLES)}, "content": {"type": "string"}},
                        "required": ["role", "content"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]


class TextFormat(Body):
    """Text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """The format of the text."""

    format: TextFormat | None = None
    verbosity: str | None = Field(None, description="Taken, without effect.")


class ReasoningOptions(Body):
    """How much the model thinks."""

    effort: str | None = Field(None, description="A variable of the chat template; none switches thinking off.")
    summary: str | None = Field(None, description="Taken, without effect: the reasoning itself is returned.")
    generate_summary: str | None = None


class ResponsesRequest(Body):
    """Respond to text or items."""

    refused: ClassVar[dict[str, str]] = {
        "conversation": "use previous_response_id, or send all items",
        "prompt": "the server has no stored prompts; send instructions and input",
        "context_management": "the server compacts no conversations",
    }
    model: str | None = None
    input: Input
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None
    temperature: Annotated[float, between(TEMPERATURE_RANGE)] | None = None
    top_p: Annotated[float, above(TOP_P_RANGE)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = Field(None, description="Respond at once, and run the request meanwhile; needs store.")
    store: bool | None = Field(None, description="Keep the response for later requests; the default, if there is room.")
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: drop the oldest turns that do not fit."
    )
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None

    top_k: Annotated[int, between(TOP_K_RANGE)] | None = None
    min_p: Annotated[float, between(MIN_P_RANGE)] | None = None
    seed: Annotated[int, between(SEED_RANGE)] | None = None
    stop: Stops = None
    presence_penalty: Annotated[float, between(PENALTY_RANGE)] | None = None
    frequency_penalty: Annotated[float, between(PENALTY_RANGE)] | None = None
    repetition_penalty: Annotated[float, above(REPETITION_PENALTY_RANGE)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Requests of the same key run on the same replica, which may have cached their prompts."
    )
    max_tool_calls: int | None = Field(None, description="Taken, without effect, as the next ones.")
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_retention: str | None = None


class ResponsesAnswer(ResponseBody):
    """The response."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: str = Field(description="queued, in_progress, completed, incomplete, failed or cancelled.")
    model: str
    output: list[dict[str, Any]] = Field(description="Items of type reasoning, message and function_call.")
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    previous_response_id: str | None
    usage: dict[str, Any] | None


class DeletedResponse(ResponseBody):
    """A response was forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(ResponseBody):
    """Items of a response's input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
