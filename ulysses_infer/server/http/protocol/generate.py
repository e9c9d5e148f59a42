"""Types of /inference/v1/generate: tokens in, tokens out, as in vLLM."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from ulysses_infer.server.http.protocol.chat import ChatLogprobs
from ulysses_infer.server.http.protocol.common import INT32, Body, PromptLogprobs, ResponseBody, StreamOptions, TokenId


class GenerateRequest(Body):
    """Continue token ids."""

    refused: ClassVar[dict[str, str]] = {"features": "the model reads only text"}
    request_id: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,128}$")] | None = None
    model: str | None = None
    token_ids: Annotated[list[TokenId], Field(min_length=1)]
    sampling_params: dict[str, Any] = Field({}, description="Fields of SamplingParams.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None


class GeneratedTokens(ResponseBody):
    """One output."""

    index: int
    token_ids: list[int]
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    weight_versions: list[str] = Field(description="Of the weights that computed it; empty if none was named.")


class GenerateAnswer(ResponseBody):
    """The response."""

    request_id: str
    choices: list[GeneratedTokens]
    prompt_logprobs: PromptLogprobs | None
    usage: dict[str, Any] | None = None
