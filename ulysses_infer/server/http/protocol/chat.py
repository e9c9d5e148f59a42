"""Types of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from ulysses_infer.server.http.protocol.common import (
    MAX_LOGPROBS,
    Body,
    Count,
    EngineFields,
    PromptLogprobs,
    ResponseBody,
    Usage,
)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
OTHER_MEDIA = ("image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file", "input_file")


def check_content(value: Any) -> Any:
    """A message's content: text, parts of text, or none. Raises ValueError."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("should be a text or a list of parts")
    for part in value:
        _check_part(part)
    return value


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in OTHER_MEDIA:
        raise ValueError(f"has a part of type {kind}; the model reads only text")
    texts = {"text": "text", "refusal": "refusal"}
    if not isinstance(kind, str) or kind not in texts or not isinstance(part.get(texts[kind]), str):
        raise ValueError('should have parts like {"type": "text", "text": "…"}')


Content = Annotated[
    str | list[dict[str, Any]] | None,
    PlainValidator(check_content),
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
                {"type": "null"},
            ]
        }
    ),
]


class CalledFunction(Body):
    """A tool call in the history."""

    name: str
    arguments: str = Field(description="JSON.")


class MadeCall(Body):
    """A tool call of an assistant message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(BaseModel):
    """One message. Unknown keys are passed to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())
    role: Annotated[str, Field(pattern=f"^({'|'.join(ROLES)})$")]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = Field(None, description="The reasoning before an assistant's answer.")
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = None


class ChatFields(Body):
    """The fields that determine the prompt."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = Field(None, description="For templates of retrieval.")
    add_generation_prompt: bool | None = Field(None, description="Open the assistant's turn; the default.")
    continue_final_message: bool | None = Field(None, description="Leave the last message open and go on with it.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    chat_template: str | None = Field(
        None, description="Replaces the model's chat template; needs server.trust_request_chat_template."
    )
    add_special_tokens: bool | None = Field(
        None, description="Add the model's first token to what the template wrote; default: no, the template has it."
    )


class ChatRequest(EngineFields, ChatFields):
    """Respond to messages."""

    refused: ClassVar[dict[str, str]] = {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "the model writes only text",
        "web_search_options": "the server has no web search; give a tool that searches",
        "use_beam_search": "beam search is not available; use n and temperature",
    }
    max_completion_tokens: Count | None = Field(None, description="The same as max_tokens; default: what fits.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: str | dict[str, Any] | None = Field(None, description="none, auto, required, or a function's name.")
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(
        None, description="A variable of the chat template; none switches thinking off, if the template can."
    )
    include_reasoning: bool | None = Field(None, description="Whether responses have the reasoning; the default.")

    verbosity: str | None = Field(None, description="Taken, without effect, as the next ones.")
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None


class TopLogprob(ResponseBody):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The chosen token and the most likely ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseBody):
    """Log-probabilities in OpenAI's newer format."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(ResponseBody):
    """The function that the model calls."""

    name: str
    arguments: str


class ToolCall(ResponseBody):
    """A tool call that the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(ResponseBody):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[dict[str, Any]] = Field(description="None: the model searches no web.")
    reasoning_content: str | None = Field(None, description="What the model thought before it answered.")
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ResponseBody):
    """One choice."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None = Field(description="stop, length, tool_calls, or abort if an administrator ended it.")
    stop_reason: int | str | None = Field(description="The stop string or stop token that ended it.")
    token_ids: list[int] | None = None


class ChatAnswer(ResponseBody):
    """The response."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
