"""Types of /tokenize, /detokenize and /tokenizer_info, as in vLLM."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ulysses_infer.server.http.protocol.chat import Message
from ulysses_infer.server.http.protocol.common import Body, ResponseBody, TokenId


class TokenizeRequest(Body):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    add_special_tokens: bool | None = Field(None, description="Default: yes for a prompt, no for messages.")
    return_token_strs: bool | None = None


class TokenizeAnswer(ResponseBody):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[TokenId]


class DetokenizeAnswer(ResponseBody):
    """The text."""

    prompt: str


class TokenizerInfo(ResponseBody):
    """The tokenizer's configuration; it has the fields that its checkpoint's has."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str
    chat_template: str | None = None
