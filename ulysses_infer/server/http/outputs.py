"""The outputs of one HTTP request in progress: tokens in, text and usage out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ulysses_infer.outputs import CONSTRAINTS, FAILED
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.generation import Generation, Prompt
from ulysses_infer.server.http.texts import Texts
from ulysses_infer.server.messages import NewToken, RequestStart
from ulysses_infer.text.detokenizer import Detokenizer


@dataclass
class Delta:
    """What is new in an output since the last call."""

    pieces: list[tuple[str, int]]
    """The new text in pieces, each with the number of the output's tokens so far."""
    tokens: list[NewToken]
    finish_reason: str | None
    """None while it continues."""
    stop_reason: int | str | None

    @property
    def text(self) -> str:
        """The new text."""
        return "".join([text for text, _ in self.pieces])

    @property
    def token_ids(self) -> list[int]:
        """The ids of the new tokens."""
        return [token.token_id for token in self.tokens]


@dataclass
class Source:
    """A prompt, and what the engine reported when it was computed."""

    prompt: Prompt
    start: RequestStart | None = None


@dataclass(eq=False)
class Output:
    """One sequence of one prompt."""

    index: int
    """Index among all outputs of the HTTP request."""
    source: Source
    detokenizer: Detokenizer
    ending_ids: frozenset[int] | None
    """Tokens that end the output and are not part of its text; None: they are part of it."""
    keeps_tokens: bool = True
    """False: only the prompt's tokens are returned."""
    num_tokens: int = 0
    weight_versions: list[str] = field(default_factory=list)
    """The versions of the weights that computed it, in order; empty if the trainer has named none."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    pieces: list[tuple[str, int]] = field(default_factory=list)
    tokens: list[NewToken] = field(default_factory=list)

    def take(self, token: NewToken) -> None:
        """Add a token. Raises `ApiError`: 400 if the request allows no token, 500 if it could not be computed."""
        if token.finish_reason == "error" and token.stop_reason == CONSTRAINTS:
            message = (
                "no token is left to choose after the request's own constraints (allowed_token_ids, bad_words, "
                "min_tokens, structured_outputs); loosen one of them"
            )
            raise ApiError(400, message, code="no_token_allowed")
        if token.finish_reason == "error" and str(token.stop_reason).startswith(FAILED):
            message = f"the engine could not complete this output: {str(token.stop_reason).removeprefix(FAILED)}"
            raise ApiError(500, message, "internal_error", code="request_failed")
        if token.finish_reason == "error":
            message = "the engine could not compute this output (its numbers were not finite); report this"
            raise ApiError(500, message, "internal_error", code="computation_failed")
        if self.keeps_tokens:
            self._add(token)
        if token.finish_reason is not None:
            self.finish_reason, self.stop_reason = token.finish_reason, token.stop_reason
            if not self.keeps_tokens:
                self.finish_reason, self.stop_reason = "length", None

    def flush(self) -> Delta:
        """What is new since the last call."""
        delta = Delta(self.pieces, self.tokens, self.finish_reason, self.stop_reason)
        self.pieces, self.tokens = [], []
        return delta

    def _add(self, token: NewToken) -> None:
        if token.token_id >= 0:
            self.num_tokens += 1
            self.tokens.append(token)
            version = token.weight_version
            if version is not None and version not in self.weight_versions:
                self.weight_versions.append(version)
            if not (token.finish_reason == "stop" and self._is_ending(token)):
                self._add_text(self.detokenizer.append([token.token_id]))
        if token.finish_reason is not None:
            self._add_text(self.detokenizer.finish())

    def _is_ending(self, token: NewToken) -> bool:
        """Whether it is an end token, rather than the last token of a stop string."""
        if self.ending_ids is None:
            return False
        return not isinstance(token.stop_reason, str) or token.token_id in self.ending_ids

    def _add_text(self, text: str) -> None:
        if text:
            self.pieces.append((text, self.num_tokens))


class Outputs:
    """All outputs of an HTTP request, by prompt and then by index."""

    def __init__(
        self, texts: Texts, generation: Generation, eos_token_ids: list[int], keeps_tokens: bool = True
    ) -> None:
        params = generation.params
        self._num_sequences = params.n
        self.sources = [Source(prompt) for prompt in generation.prompts]
        ending = frozenset([*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)])
        ending_ids = None if params.include_stop_str_in_output else ending
        self.all = [
            Output(
                position * params.n + sequence,
                source,
                Detokenizer(texts.decoder, params, source.prompt.token_ids),
                ending_ids,
                keeps_tokens,
            )
            for position, source in enumerate(self.sources)
            for sequence in range(params.n)
        ]

    def take(self, position: int, batch: list[NewToken]) -> list[Output]:
        """Distribute the tokens of a prompt; returns the outputs that received any."""
        source = self.sources[position]
        first = position * self._num_sequences
        touched: dict[int, Output] = {}
        for token in batch:
            if token.start is not None and source.start is None:
                source.start = token.start
            output = touched[token.index] = self.all[first + token.index]
            output.take(token)
        return list(touched.values())

    def usage(self) -> dict[str, Any]:
        """Tokens used so far, in OpenAI's shape."""
        num_prompt_tokens = sum(len(source.prompt.token_ids) for source in self.sources)
        num_cached_tokens = sum(source.start.num_cached_tokens for source in self.sources if source.start is not None)
        num_output_tokens = sum(output.num_tokens for output in self.all)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        }
