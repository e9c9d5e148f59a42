"""The outputs of a request, with vLLM's names. Plain picklable data without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

CONSTRAINTS = "constraints"
"""Stop reason of a request that ended with an error because its own constraints leave no token to choose."""
FAILED = "failed: "
"""Begins the stop reason of a request that ended with an error of its own; what went wrong follows."""


@dataclass
class Logprob:
    """Log-probability of one token at one position, with its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One entry per prompt token; the first has nothing before it and is None.
PromptLogprobs = list[dict[int, Logprob] | None]
# One entry per output token.
SampleLogprobs = list[dict[int, Logprob]]


@dataclass
class RequestMetrics:
    """Moments of one request's life, in seconds on rank 0's monotonic clock. None: not reached yet."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_output_tokens: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step that ran any of it."""
        return _elapsed(self.arrival_time, self.first_scheduled_time)

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from arrival to the first output token."""
        return _elapsed(self.arrival_time, self.first_token_time)

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds: (last - first token) / (tokens - 1)."""
        decoding = _elapsed(self.first_token_time, self.last_token_time)
        if decoding is None or self.num_output_tokens < 2:
            return None
        return decoding / (self.num_output_tokens - 1)

    @property
    def e2e_latency(self) -> float | None:
        """Seconds from arrival to the end of the request."""
        return _elapsed(self.arrival_time, self.finished_time)


@dataclass
class CompletionOutput:
    """One of the `n` outputs of a request.

    `finish_reason` is None while it runs, then "stop", "length", "abort" or "error". `stop_reason` is the
    stop string or stop token id that ended it; None for eos and for every other reason.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether this output is complete."""
        return self.finish_reason is not None

    def copy(self, index: int) -> CompletionOutput:
        """An equal output at another index, with lists of its own."""
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return replace(self, index=index, token_ids=list(self.token_ids), logprobs=logprobs)


@dataclass
class RequestOutput:
    """A request's outputs so far. `prompt` is None when token ids were given instead of text."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    metrics: RequestMetrics | None = None
    pooled: list[float] | None = None  # the prompt's vector, if `pooling` was given: one value per hidden dimension

    def with_copies(self, num_copies: int) -> RequestOutput:
        """This one with `num_copies` outputs equal to its only one, which was computed once for all."""
        if num_copies == 1:
            return self
        [only] = self.outputs
        return replace(self, outputs=[only.copy(index) for index in range(num_copies)])


def normalized(vector: list[float]) -> list[float]:
    """The vector divided by its length; zero stays zero."""
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]


def _elapsed(start: float | None, stop: float | None) -> float | None:
    return None if start is None or stop is None else stop - start
