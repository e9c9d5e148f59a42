"""Fields shared by requests, and parts of responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from ulysses_infer.request_values import MAX_COUNT
from ulysses_infer.sampling_params import (
    LOGIT_BIAS_RANGE,
    MIN_P_RANGE,
    PENALTY_RANGE,
    REPETITION_PENALTY_RANGE,
    SEED_RANGE,
    TEMPERATURE_RANGE,
    TOP_K_RANGE,
    TOP_P_RANGE,
)

MAX_SEQUENCES = 128  # per prompt, as in OpenAI's API
MAX_LOGPROBS = 20
MAX_STOPS = 64  # every character of the text is compared with each
INT32 = 2**31 - 1


class Body(BaseModel):
    """A request body. Types are not converted. Unknown keys are errors, which `body.py` may forgive."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    refused: ClassVar[dict[str, str]] = {}
    """Fields of OpenAI's API that this server does not support, with what to do instead."""
    is_strict: ClassVar[bool] = False
    """Whether unknown fields are errors whatever `server.unknown_fields` says."""


class ResponseBody(BaseModel):
    """Part of a response, for /openapi.json."""

    model_config = ConfigDict(protected_namespaces=())


def check_strings(value: Any) -> Any:
    """One text or a list of texts. Raises ValueError."""
    if isinstance(value, str) or value is None:
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("should be a text or a list of texts")
    if len(value) > MAX_STOPS:
        raise ValueError(f"should have at most {MAX_STOPS} texts")
    return value


Stops = Annotated[
    str | list[str] | None,
    PlainValidator(check_strings),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
                {"type": "null"},
            ]
        }
    ),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


def between(bounds: tuple[int, int]) -> Any:
    """A field within `bounds`, both included."""
    return Field(ge=bounds[0], le=bounds[1])


def above(bounds: tuple[int, int]) -> Any:
    """A field within `bounds`, the lower one excluded."""
    return Field(gt=bounds[0], le=bounds[1])


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="End with a chunk that has the usage and no choices.")
    continuous_usage_stats: bool | None = Field(None, description="Every chunk has the usage so far.")
    include_obfuscation: bool | None = Field(None, description="Taken, without effect.")


class StructuredOutputsField(Body):
    """What an output must match: exactly one of json, regex, choice, grammar and json_object."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = Field(None, description="Regex of the white space between two parts of JSON.")


class JsonSchema(Body):
    """The schema of a response format."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, any JSON object, or JSON that matches a schema."""

    type: Annotated[str, Field(pattern="^(text|json_object|json_schema)$")]
    json_schema: JsonSchema | None = None


class SamplingFields(Body):
    """Sampling: OpenAI's fields and vLLM's additional ones. Null means the default."""

    model: str | None = Field(None, description="The served model or an adapter; null: server.default_model.")
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    best_of: int | None = Field(None, description="Only the value of n is accepted.")
    temperature: Annotated[float, between(TEMPERATURE_RANGE)] | None = None
    top_p: Annotated[float, above(TOP_P_RANGE)] | None = None
    top_k: Annotated[int, between(TOP_K_RANGE)] | None = None
    min_p: Annotated[float, between(MIN_P_RANGE)] | None = None
    seed: Annotated[int, between(SEED_RANGE)] | None = None
    stop: Stops = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    presence_penalty: Annotated[float, between(PENALTY_RANGE)] | None = None
    frequency_penalty: Annotated[float, between(PENALTY_RANGE)] | None = None
    repetition_penalty: Annotated[float, above(REPETITION_PENALTY_RANGE)] | None = None
    logit_bias: dict[str, Annotated[float, between(LOGIT_BIAS_RANGE)]] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    bad_words: list[Annotated[str, Field(min_length=1)]] | None = None
    # SamplingParams also takes -1, the whole vocabulary: too long a response for HTTP
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    speculation: bool | None = Field(None, description="false: no tokens of this request are drafted.")


class EngineFields(SamplingFields):
    """How the engine treats the request, and what outputs must match."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = Field(None, description="Lower runs earlier.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Cached prompts are shared only with requests of the same salt."
    )
    request_id: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,128}$")] | None = Field(
        None, description="Becomes part of the answer's id; must not be in use."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = Field(
        None, description="Keep only the last tokens of a prompt; -1: as many as leave room for max_tokens."
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description='Tokens in log-probabilities are written as "token_id:17".'
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsField | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="The same as structured_outputs.json.")
    guided_regex: str | None = Field(None, description="The same as structured_outputs.regex.")
    guided_choice: list[str] | None = Field(None, description="The same as structured_outputs.choice.")
    guided_grammar: str | None = Field(None, description="The same as structured_outputs.grammar.")
    guided_whitespace_pattern: str | None = Field(
        None, description="The same as structured_outputs.whitespace_pattern, for response_format and guided_json too."
    )

    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Requests of the same key run on the same replica, which may have cached their prompts."
    )
    user: str | None = Field(None, description="Taken, without effect, as the next ones.")
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None


class PromptTokensDetails(ResponseBody):
    """The origin of the prompt's tokens."""

    cached_tokens: int


class CompletionTokensDetails(ResponseBody):
    """What the generated tokens are."""

    reasoning_tokens: int


class Usage(ResponseBody):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class PromptLogprob(ResponseBody):
    """A token of the prompt, or an alternative to one."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class ErrorDetails(ResponseBody):
    """Details of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(ResponseBody):
    """The body of every error."""

    error: ErrorDetails
