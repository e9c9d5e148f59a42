"""Logits rows to tokens and log-probabilities, for one step, on rank 0."""

from __future__ import annotations

import torch

from ulysses_infer.engine.batch import Batch, ScheduledRequest
from ulysses_infer.engine.completion import Completion, Sequence, top_logprobs
from ulysses_infer.engine.detokenizer import TokenDecoder
from ulysses_infer.engine.plan import ALL_LOGITS, LAST_LOGITS, PlanItem
from ulysses_infer.model.sampler import Sampler


class StepResults:
    """Consumes one step's logits rows as they arrive and keeps what was made of them.

    Rows come in batch order: for a sequence with prompt log-probabilities one a computed token, else its last one.
    """

    def __init__(
        self, batch: Batch, items: list[PlanItem], owners: dict[int, tuple[Completion, Sequence]],
        decoder: TokenDecoder | None,
    ) -> None:  # fmt: skip
        self._owners, self._decoder, self._sampler = owners, decoder, Sampler()
        self._rows: list[tuple[ScheduledRequest, int, bool]] = []  # (request, position, whether it samples)
        for scheduled, item in zip(batch.scheduled, items, strict=True):
            end = item.start + item.num_tokens
            first = {ALL_LOGITS: item.start, LAST_LOGITS: end - 1}.get(item.logits, end)
            for position in range(first, end):
                self._rows.append((scheduled, position, scheduled.samples and position == end - 1))
        self.tokens: dict[int, int] = {}

    def take_greedy(self, tokens: list[int]) -> None:
        """The best token of every row, chosen by the ranks together."""
        for (scheduled, _, samples), token in zip(self._rows, tokens, strict=True):
            if samples:
                self.tokens[scheduled.request.index] = token

    def take_rows(self, start: int, logits: torch.Tensor) -> None:
        """Whole rows `[start, start + n)`. logits: [n, V] float32."""
        rows = self._rows[start : start + logits.shape[0]]
        self._sample(logits, rows)
        self._score_prompt(logits, rows)

    def _sample(self, logits: torch.Tensor, rows: list[tuple[ScheduledRequest, int, bool]]) -> None:
        chosen = [(i, self._owners[s.request.index][1]) for i, (s, _, samples) in enumerate(rows) if samples]
        if not chosen:
            return
        picked = logits[[i for i, _ in chosen]]
        tokens = self._sampler.sample(picked, [sequence.row for _, sequence in chosen])
        scored = []
        for row, ((_, sequence), token) in enumerate(zip(chosen, tokens, strict=True)):
            self.tokens[sequence.request.index] = token
            if sequence.request.params.logprobs is not None and token >= 0:
                scored.append((row, sequence, token))
        self._score_tokens(picked, scored)

    def _score_tokens(self, logits: torch.Tensor, scored: list[tuple[int, Sequence, int]]) -> None:
        if not scored:
            return
        counts = [sequence.request.params.logprobs or 0 for _, sequence, _ in scored]
        tokens = [token for _, _, token in scored]
        entries = top_logprobs(logits[[row for row, _, _ in scored]], tokens, counts, self._decoder)
        for (_, sequence, token), entry in zip(scored, entries, strict=True):
            sequence.logprobs.append(entry)
            sequence.cumulative_logprob += entry[token].logprob

    def _score_prompt(self, logits: torch.Tensor, rows: list[tuple[ScheduledRequest, int, bool]]) -> None:
        """The row at position p scores the prompt's token at p + 1."""
        for i, (scheduled, position, _) in enumerate(rows):
            request = scheduled.request
            completion = self._owners[request.index][0]
            listed = completion.prompt_logprobs
            wants = request.params.prompt_logprobs is not None and position + 1 < request.num_prompt_tokens
            # Siblings and recomputed chunks meet positions that are scored already.
            if wants and listed is not None and len(listed) == position + 1:
                token = request.prompt_token_ids[position + 1]
                count = request.params.prompt_logprobs or 0
                listed += top_logprobs(logits[i : i + 1], [token], [count], self._decoder)
