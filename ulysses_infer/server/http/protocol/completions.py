"""Types of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from ulysses_infer.server.http.protocol.common import (
    INT32,
    MAX_LOGPROBS,
    EngineFields,
    PromptLogprobs,
    ResponseBody,
    Usage,
)

MAX_PROMPTS = 4096
PROMPT_RULE = "should be a text, a list of texts, a list of token ids or a list of lists of token ids, not empty"


def check_prompt(value: Any) -> list[str | list[int]]:
    """The prompts of a request as a list. Raises ValueError."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(PROMPT_RULE)
    if _are_token_ids(value):
        return [value]
    if not all(isinstance(item, str) for item in value) and not all(_are_token_ids(item) for item in value):
        raise ValueError(PROMPT_RULE)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"should have at most {MAX_PROMPTS} prompts")
    return value


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item <= INT32 for item in value)


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32}, "minItems": 1}
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                _TOKEN_IDS,
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


class CompletionRequest(EngineFields):
    """Continue prompts."""

    refused: ClassVar[dict[str, str]] = {
        "suffix": "the model only continues a prompt; put everything before the gap into prompt",
        "use_beam_search": "beam search is not available; use n and temperature",
    }
    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="The answer starts with the prompt; max_tokens may then be 0.")
    add_special_tokens: bool | None = Field(None, description="Whether text gets the model's first token; the default.")


class CompletionLogprobs(ResponseBody):
    """Log-probabilities in OpenAI's older format: lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseBody):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None = Field(description="stop, length, or abort if an administrator ended it.")
    stop_reason: int | str | None = Field(description="The stop string or stop token that ended it.")
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(ResponseBody):
    """The outputs, those of the first prompt first."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
