"""The requests of an engine: added, aborted and forgotten, with what the loop has to know of each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from ulysses_infer.cache.prefix import prefix_salt
from ulysses_infer.config import Config
from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.completion import Completion, Sequence
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.scheduler import Scheduler
from ulysses_infer.errors import RequestError
from ulysses_infer.model.lora.table import ServedAdapters
from ulysses_infer.model.sampling.pooler import Pooler
from ulysses_infer.model.sampling.row import SamplingRow, needs_full_logits, reads_outputs
from ulysses_infer.model.sampling.seeds import derive_seed
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.detokenizer import Detokenizer
from ulysses_infer.text.prompts import PromptReader


class RequestTable:
    """All unfinished requests of rank 0."""

    def __init__(
        self, config: Config, scheduler: Scheduler, prompts: PromptReader, vocab_size: int, text: bool
    ) -> None:
        """text: whether outputs carry text; without it, text is only produced to find stop strings."""
        self._config, self._scheduler, self._prompts, self._vocab_size = config, scheduler, prompts, vocab_size
        self.decoder = prompts.decoder if text else None
        self.adapters = ServedAdapters(config.lora.adapters, config.lora.runtime_bytes)
        self.sequences: dict[int, tuple[Completion, Sequence]] = {}
        """The request and the sequence of each scheduler request, by its index."""
        self.on_end: Callable[[Request], None] | None = None
        """Called with every request that has ended, for whatever reason."""
        self._completions: dict[str, Completion] = {}
        self._full_logits: set[int] = set()
        self._output_readers: set[int] = set()
        self._forgotten: list[int] = []
        self._indices, self._names = itertools.count(), itertools.count()

    def add(
        self, prompt: Any, params: SamplingParams, request_id: str | None, priority: int, salt: str, adapter: str | None
    ) -> str:
        """Queue a prompt; returns its request id. Raises `RequestError`, and nothing is queued, if it is invalid."""
        arrival_time = time.monotonic()
        params = params.clone()
        params.validate_for(self._vocab_size)
        text, token_ids = self._prompts.read(prompt)
        name = request_id if request_id is not None else f"request-{next(self._names)}"
        if name in self._completions:
            raise RequestError(f"request id {name!r} is in use; use another")
        adapter_number = self.adapters.number(adapter)
        completion = Completion(name, text, token_ids, params)
        completion.prompt_logprobs = None if params.prompt_logprobs is None else [None]
        completion.pooler = None if params.pooling is None else Pooler(params.pooling, len(token_ids))
        seed, salt = self._prompts.seed(params), prefix_salt(salt, adapter_number)
        for index in range(params.n):
            request = Request(
                request_id=name if params.n == 1 else f"{name}#{index}",
                index=next(self._indices),
                prompt_token_ids=token_ids,
                params=params,
                arrival_time=arrival_time,
                priority=priority,
                cache_salt=salt,
                adapter=adapter_number,
                eos_token_ids=self._prompts.eos_token_ids,
            )
            completion.sequences.append(self._make_sequence(request, derive_seed(seed, index)))
        self._queue(completion)
        return name

    def _make_sequence(self, request: Request, seed: int) -> Sequence:
        params, prompts = request.params, self._prompts
        row = SamplingRow(
            params,
            seed,
            request.prompt_token_ids,
            request.output_token_ids,
            request.eos_token_ids,
            prompts.bad_words(params),
            prompts.grammar(params, request.prompt_token_ids),
        )
        decoder = prompts.decoder if params.stop else self.decoder
        return Sequence(request, row, Detokenizer(decoder, params, request.prompt_token_ids))

    def _queue(self, completion: Completion) -> None:
        """Give the sequences to the scheduler: all or none. Raises `RequestError`."""
        self._completions[completion.request_id] = completion
        try:
            for sequence in completion.sequences:
                self._scheduler.add(sequence.request)
                self._remember(completion, sequence)
        except RequestError:
            self.abort(completion.request_id)
            raise

    def _remember(self, completion: Completion, sequence: Sequence) -> None:
        index, params = sequence.request.index, sequence.request.params
        self.sequences[index] = completion, sequence
        if needs_full_logits(params) or params.logprobs is not None or params.prompt_logprobs is not None:
            self._full_logits.add(index)
        if reads_outputs(params):
            self._output_readers.add(index)

    def take_unused_adapters(self) -> list[int]:
        """Numbers of removed adapters that no request uses any more; the caller drops their weights."""
        return self.adapters.take_unused({sequence.request.adapter for _, sequence in self.sequences.values()})

    def abort(self, request_id: str) -> Completion | None:
        """End a request in any state; returns it with its outputs so far, or None if it is unknown or finished."""
        completion = self._completions.pop(request_id, None)
        if completion is None:
            return None
        for sequence in completion.sequences:
            if self._scheduler.abort(sequence.request.request_id) is not None:
                self.forget(sequence.request)
                sequence.finish_text()
        return completion

    def abort_all(self) -> list[Completion]:
        """End every request; returns them with their outputs so far."""
        aborted = [self.abort(request_id) for request_id in list(self._completions)]
        return [completion for completion in aborted if completion is not None]

    def forget(self, request: Request) -> None:
        """Drop a finished sequence; the next plan drops its block tables on the other ranks."""
        if self.sequences.pop(request.index, None) is not None:
            self._forgotten.append(request.index)
            self._full_logits.discard(request.index)
            self._output_readers.discard(request.index)
            if self.on_end is not None:
                self.on_end(request)

    def forget_completion(self, completion: Completion) -> None:
        """Drop a request whose sequences have all finished."""
        del self._completions[completion.request_id]

    def add_forgotten(self, indices: list[int]) -> None:
        """Have the other ranks drop the block tables of these sequences with the next plan."""
        self._forgotten += indices

    def take_forgotten(self) -> list[int]:
        """Sequences whose block tables the next plan drops on every rank."""
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    @property
    def need_outputs(self) -> bool:
        """Whether some request's next token cannot be chosen before its last one is on the host."""
        return bool(self._output_readers)

    def need_full_logits(self, batch: Batch) -> bool:
        """Whether rank 0 needs whole logits rows for any request of the batch."""
        return bool(self._full_logits) and any(item.request.index in self._full_logits for item in batch.scheduled)

    def is_full(self, max_num_queued_requests: int) -> bool:
        """Whether the queue is at its limit, not counting requests that the next step can start."""
        free_seats = self._config.scheduler.max_num_seqs - self._scheduler.num_running
        return self._scheduler.num_waiting >= max_num_queued_requests + max(0, free_seats)

    def check_idle(self, operation: str) -> None:
        """Raise `RequestError` while requests run or wait."""
        if self._scheduler.has_unfinished:
            raise RequestError(
                f"{operation} has to wait: {self._scheduler.num_running} requests are running and "
                f"{self._scheduler.num_waiting} waiting; let them end, or abort them"
            )
