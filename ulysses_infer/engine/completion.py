"""A user's request in progress: `n` sequences over one prompt, with text and log-probabilities."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from ulysses_infer.engine.request import Request
from ulysses_infer.model.sampling.pooler import Pooler
from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.model.sampling.transfer import to_device_async
from ulysses_infer.outputs import CompletionOutput, Logprob, PromptLogprobs, RequestMetrics, RequestOutput
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.detokenizer import Detokenizer, TokenDecoder
from ulysses_infer.worker.transfer import DeviceToHostCopy

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Sequence:
    """One of the `n` outputs: the scheduler's request, its sampling state and its detokenizer."""

    request: Request
    row: SamplingRow
    detokenizer: Detokenizer
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    num_taken: int = 0
    """Output tokens that the detokenizer has got."""

    @property
    def is_finished(self) -> bool:
        """Whether this output has ended, for whatever reason."""
        return self.request.is_finished

    def take_tokens(self) -> str | None:
        """Detokenize the new tokens, up to a stop string; returns that if there is one, and drops what follows."""
        request = self.request
        ended_by_token = request.finish_reason == "stop"
        while self.num_taken < request.num_output_tokens:
            token = request.output_token_ids[self.num_taken]
            self.num_taken += 1
            is_last = self.num_taken == request.num_output_tokens
            if not (ended_by_token and is_last) or request.params.include_stop_str_in_output:
                self.detokenizer.append([token])
            if self.detokenizer.stop_reason is not None and not is_last:
                del request.output_token_ids[self.num_taken :]
                self._drop_logprobs()
                return self.detokenizer.stop_reason
        self._drop_logprobs()
        if request.is_finished:
            self.detokenizer.finish()
        return self.detokenizer.stop_reason

    def _drop_logprobs(self) -> None:
        """Drop those of accepted drafted tokens after the end of the output."""
        tokens = self.request.output_token_ids
        if len(self.logprobs) > len(tokens):
            del self.logprobs[len(tokens) :]
            scored = (entry[token].logprob for entry, token in zip(self.logprobs, tokens, strict=True))
            self.cumulative_logprob = sum(scored, 0.0)

    def finish_text(self) -> None:
        """Give out the text held back of an aborted output; nothing if that raises, as tokenizer libraries may."""
        try:
            self.detokenizer.finish()
        except Exception:
            logger.exception("the end of the text of request %s cannot be decoded", self.request.request_id)

    def output(self, index: int) -> CompletionOutput:
        """The output so far."""
        request = self.request
        wants_logprobs = request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=self.detokenizer.text,
            token_ids=list(request.output_token_ids),
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )


@dataclass(eq=False)
class Completion:
    """A user's request: a prompt and its sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    pooler: Pooler | None = None
    """Makes the prompt's vector, if it was asked for."""

    @property
    def is_finished(self) -> bool:
        """Whether every output has ended."""
        if len(self.sequences) == 1:  # called hundreds of times per step
            return self.sequences[0].request.is_finished
        return all(sequence.is_finished for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """The outputs so far."""
        first = self.sequences[0].request
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.output(index) for index, sequence in enumerate(self.sequences)],
            finished=self.is_finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            metrics=_metrics([sequence.request for sequence in self.sequences]),
            pooled=None if self.pooler is None else self.pooler.vector(),
        )


def _metrics(requests: list[Request]) -> RequestMetrics:
    """Times of the whole request: from the start of its first sequence to the end of its last."""
    first_tokens = [r.first_token_time for r in requests if r.first_token_time is not None]
    last_tokens = [r.last_token_time for r in requests if r.last_token_time is not None]
    ends = [r.finish_time for r in requests if r.finish_time is not None]
    return RequestMetrics(
        arrival_time=requests[0].arrival_time,
        first_scheduled_time=requests[0].first_scheduled_time,
        first_token_time=min(first_tokens, default=None),
        last_token_time=max(last_tokens, default=None),
        finished_time=max(ends) if len(ends) == len(requests) else None,
        num_output_tokens=max(r.num_output_tokens for r in requests),
    )


class TokenScores:
    """Log-probabilities of each row's chosen token and its most likely tokens, from the model's own logits.

    The device starts computing them when this is made, and is waited for when they are read.
    """

    def __init__(
        self, logits: torch.Tensor, tokens: torch.Tensor, counts: list[int], wanted: list[list[int]] | None = None
    ) -> None:
        """logits: [n, V] float32; tokens: [n] int64 on the same device, negative for none; counts[i]: the number of
        most likely tokens for row i (-1: all); wanted[i]: further tokens of row i."""
        vocab_size = logits.shape[1]
        self._counts = counts
        logprobs = logits.float().log_softmax(dim=-1)
        chosen = logprobs.gather(1, tokens.clamp(min=0)[:, None])
        values, ids = logprobs.topk(max(vocab_size if count < 0 else count for count in counts), dim=-1)
        ranks = (logprobs > chosen).sum(dim=1) + 1
        self._wanted = wanted or [[]] * len(counts)
        self._others = _scores_of(logprobs, self._wanted)
        self._parts = [DeviceToHostCopy(part) for part in (tokens, chosen[:, 0], ranks, values, ids)]

    def entries(self, decoder: TokenDecoder | None) -> list[dict[int, Logprob]]:
        """One dictionary per row, by token: the chosen token first, then the most likely in order, as in vLLM."""
        entries = []
        others = iter([] if self._others is None else zip(*(part.wait() for part in self._others), strict=True))
        for named, count, token, logprob, rank, values, ids in zip(
            self._wanted, self._counts, *(part.wait() for part in self._parts), strict=True
        ):
            entry = {token: Logprob(logprob, rank, _text(decoder, token))}
            wanted = len(ids) if count < 0 else count
            for position, (other, value) in enumerate(zip(ids[:wanted], values[:wanted], strict=True), start=1):
                entry.setdefault(other, Logprob(value, position, _text(decoder, other)))
            for other in named:
                value, position = next(others)
                entry.setdefault(other, Logprob(value, position, _text(decoder, other)))
            entries.append(entry)
        return entries


def _scores_of(logprobs: torch.Tensor, wanted: list[list[int]]) -> list[DeviceToHostCopy] | None:
    """The log-probabilities of all tokens of `wanted`, row by row, and their ranks; None if there are none.

    logprobs: [n, V]."""
    if not any(wanted):
        return None
    rows = [row for row, tokens in enumerate(wanted) for _ in tokens]
    of_tokens = logprobs[to_device_async(rows, logprobs)]
    places = to_device_async([token for tokens in wanted for token in tokens], logprobs, torch.int64)
    values = of_tokens.gather(1, places[:, None])
    return [DeviceToHostCopy(values[:, 0]), DeviceToHostCopy((of_tokens > values).sum(dim=1) + 1)]


def _text(decoder: TokenDecoder | None, token: int) -> str | None:
    return None if decoder is None or token < 0 else decoder.text_of(token)
