"""Types of /v1/messages, Anthropic's API."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from ulysses_infer.sampling_params import TOP_K_RANGE, TOP_P_RANGE
from ulysses_infer.server.http.protocol.common import Body, Count, ResponseBody, above, between

FIELDS: dict[str, dict[str, type]] = {
    "text": {"text": str},
    "thinking": {"thinking": str},
    "redacted_thinking": {},
    "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str},
}
"""The blocks that this server reads, and the fields each must have."""


def check_blocks(value: Any) -> Any:
    """A message's content: text or blocks. Raises ValueError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("should be a text or a list of blocks")
    for block in value:
        _check_block(block)
    return value


def _check_block(block: Any) -> None:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ValueError(f"has a block of type {kind}; the model reads {', '.join(FIELDS)}")
    for name, of in FIELDS[kind].items():
        if not isinstance(block.get(name), of):
            raise ValueError(f"has a block of type {kind} whose {name} is not {'an object' if of is dict else 'text'}")
    if kind == "tool_result" and block.get("content") is not None:
        check_blocks(block["content"])


Blocks = Annotated[
    str | list[dict[str, Any]],
    PlainValidator(check_blocks),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


class InputMessage(Body):
    """One turn."""

    role: Literal["user", "assistant"]
    content: Blocks


class InputTool(Body):
    """A tool that the model may call."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = Field(None, description="Taken, without effect: prompts are always cached.")


class InputToolChoice(Body):
    """Which tool the model calls."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, description="Taken, without effect.")
    display: str | None = None


class OutputForm(Body):
    """A JSON schema that the text must match."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the model answers."""

    effort: str | None = Field(None, description="The variable reasoning_effort of the chat template.")
    format: OutputForm | None = None


class PromptFields(Body):
    """The fields that determine the prompt."""

    refused: ClassVar[dict[str, str]] = {
        "mcp_servers": "the server calls no tools; give tools that the client runs",
        "container": "the server runs no code",
    }
    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: Blocks | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    cache_control: dict[str, Any] | None = Field(None, description="Taken, without effect.")


class CountTokensRequest(PromptFields):
    """Count the tokens of a prompt."""


class MessagesRequest(PromptFields):
    """Respond to messages."""

    max_tokens: Annotated[Count, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, between((0, 1))] | None = None
    top_p: Annotated[float, above(TOP_P_RANGE)] | None = None
    top_k: Annotated[int, between(TOP_K_RANGE)] | None = None
    ignore_eos: bool | None = Field(None, description="Beyond Anthropic's API: true: go on until max_tokens.")
    metadata: dict[str, Any] | None = Field(None, description="Taken, without effect, as the next one.")
    service_tier: str | None = None


class MessagesUsage(ResponseBody):
    """Token counts."""

    input_tokens: int = Field(description="Tokens of the prompt that were not cached.")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, int] = Field(description="thinking_tokens: how many of them were thinking.")
    cache_creation: None
    inference_geo: None
    server_tool_use: None
    service_tier: Literal["standard"]


class MessagesAnswer(ResponseBody):
    """The response."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]] = Field(description="Blocks of type thinking, text and tool_use.")
    stop_reason: str | None = Field(description="end_turn, max_tokens, stop_sequence or tool_use.")
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: MessagesUsage


class CountTokensAnswer(ResponseBody):
    """The number of tokens."""

    input_tokens: int


class AnthropicErrorDetails(ResponseBody):
    """Details of an error."""

    type: str
    message: str


class AnthropicErrorAnswer(ResponseBody):
    """The body of every error."""

    type: Literal["error"]
    error: AnthropicErrorDetails
