"""What the outputs of a chat request are made of: reasoning, content and tool calls."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ulysses_infer.server.http.context import AppContext
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.output_reader import OutputReader
from ulysses_infer.server.http.protocol.chat import ChatRequest
from ulysses_infer.server.http.tool_use import ToolUse, alternatives_of, tool_use, with_alternatives
from ulysses_infer.server.reasoning import ReasoningFormat
from ulysses_infer.server.tool_calls import SpecialTags, special_tags
from ulysses_infer.server.tool_calls.pieces import tag_writer
from ulysses_infer.structured_outputs import StructuredOutputs
from ulysses_infer.text.detokenizer import TokenDecoder


@dataclass(frozen=True)
class OutputFormat:
    """The format of the outputs of one request."""

    use: ToolUse
    reasoning: ReasoningFormat | None
    special: SpecialTags | None
    """Special tokens in the markup, which the text for the parsers must have and content must not."""

    def reader(self, prompt: str) -> OutputReader:
        """A reader for one output. prompt: the text before it."""
        parser = None if self.reasoning is None else self.reasoning.parser(prompt)
        return OutputReader(parser, self.use.parser(), self.special, self.use.is_allowed, self.use.is_parallel)

    def constraint(self, prompt: str) -> StructuredOutputs | None:
        """The constraint on outputs: reasoning, which is free, and then what the request demands. Raises `ApiError`."""
        wanted = self.use.constraint
        if wanted is None or self.reasoning is None:
            return wanted
        prefix = self.reasoning.prefix(prompt, tag_writer({} if self.special is None else self.special.tags))
        if not prefix:
            return wanted
        alternatives = alternatives_of(wanted)
        if alternatives is None:
            message = (
                "a grammar cannot follow reasoning; switch reasoning off with chat_template_kwargs, or use a regex"
            )
            raise ApiError(400, message, param="structured_outputs")
        return with_alternatives(wanted, [[*prefix, *pieces] for pieces in alternatives])


def output_format(context: AppContext, body: ChatRequest, wanted: Mapping[str, Any] | None) -> OutputFormat:
    """The format of the outputs of a request that must match `wanted`. Raises `RequestError`, `ApiError`."""
    use = tool_use(context, body)
    reasoning = context.reasoning_format
    tags = (*(use.format.tags if use.format is not None else ()), *(reasoning.tags if reasoning is not None else ()))
    special = None if body.skip_special_tokens is False else _special_tags(context, tags)
    demanded = None if wanted is None else StructuredOutputs.from_mapping(wanted)
    use = use.with_response_format(body, demanded, {} if special is None else special.tags)
    return OutputFormat(use, reasoning, special)


def _special_tags(context: AppContext, tags: tuple[str, ...]) -> SpecialTags | None:
    decoder = context.texts.decoder
    return None if decoder is None or not tags else _special_tags_of(tags, decoder)


@functools.lru_cache(8)
def _special_tags_of(tags: tuple[str, ...], decoder: TokenDecoder) -> SpecialTags | None:
    return special_tags(tags, decoder.special_texts)
