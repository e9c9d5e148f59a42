"""Turns the logits rows of one step into tokens and log-probabilities, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rows

import torch

from ulysses_infer.engine.batch import Batch, ScheduledRequest
from ulysses_infer.engine.completion import Completion, Sequence, TokenScores
from ulysses_infer.model.sampling.drafted import rows_after
from ulysses_infer.model.sampling.drawable import drawable
from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.model.sampling.sampler import NO_TOKEN, Sampler
from ulysses_infer.model.sampling.transfer import to_device_async
from ulysses_infer.outputs import Logprob
from ulysses_infer.text.detokenizer import TokenDecoder
from ulysses_infer.worker.step_plan import ALL_LOGITS, DRAFT_LOGITS, LAST_LOGITS, PlanItem

NO_SOURCES: Mapping[int, Rows[torch.Tensor | None]] = {}


class StepResults:
    """Chooses tokens for the logits rows of one step, and assigns them to requests when they arrive.

    Rows come in batch order: one per computed token for sequences with prompt log-probabilities or drafted tokens, else
    only the last.
    """

    def __init__(
        self,
        batch: Batch,
        items: list[PlanItem],
        owners: dict[int, tuple[Completion, Sequence]],
        decoder: TokenDecoder | None,
        may_replace_drafts: bool = False,
        scores_processed: bool = False,
        draft_sources: Mapping[int, Rows[torch.Tensor | None]] = NO_SOURCES,
    ) -> None:
        """may_replace_drafts: apply rejection sampling to drafted tokens (`draw_unless_accepted`). scores_processed:
        log-probabilities are those of the distribution that is sampled, instead of the model's. draft_sources: what
        drafted tokens were drawn from (`SamplingRow.draft_source`), by request index."""
        self._owners, self._decoder, self._sampler = owners, decoder, Sampler()
        self._may_replace, self._scores_processed = may_replace_drafts, scores_processed
        self._sources = draft_sources
        self._rows: list[tuple[ScheduledRequest, int, bool]] = []  # (request, position, whether it samples)
        for scheduled, item in zip(batch.scheduled, items, strict=True):
            end = item.start + item.num_tokens
            first = {ALL_LOGITS: item.start, DRAFT_LOGITS: item.start, LAST_LOGITS: end - 1}.get(item.logits, end)
            samples_from = end - 1 - len(scheduled.drafts)
            for position in range(first, end):
                self._rows.append((scheduled, position, scheduled.samples and position >= samples_from))
        self._drafted: dict[int, Iterator[SamplingRow]] = {}  # what is left of the rows of each drafted request
        self._scores: list[tuple[list[tuple[Sequence, int]], TokenScores]] = []  # with the drafts before each row
        self.tokens: dict[int, int] = {}
        """The token of each request that sampled and still runs; `NO_TOKEN` where its constraints allow none."""
        self.accepted: dict[int, int] = {}
        """How many drafted tokens come before that one, for each request with drafts that still runs."""

    @property
    def rows_of_requests(self) -> dict[int, int]:
        """The logits row of each request that samples."""
        return {scheduled.request.index: row for row, (scheduled, _, samples) in enumerate(self._rows) if samples}

    def choose(self, start: int, logits: torch.Tensor) -> torch.Tensor:
        """The tokens of logits rows `[start, start + n)`; rows that do not sample get an arbitrary value.

        logits: [n, V] float32; returns [n] int64.
        """
        rows = self._rows[start : start + logits.shape[0]]
        places = [place for place, (_, _, samples) in enumerate(rows) if samples]
        tokens = torch.full((len(rows),), NO_TOKEN, dtype=torch.int64, device=logits.device)
        if len(places) == len(rows):
            tokens = self._sample(logits, rows)
        elif places:
            chosen = to_device_async(places, logits)
            tokens[chosen] = self._sample(logits[chosen], [rows[place] for place in places])
        self._score_prompt(logits, rows)
        return tokens

    def pool(self, hidden: torch.Tensor) -> None:
        """Take what the vocabulary head read for every row: hidden [n, D], n rows in batch order."""
        for row, (scheduled, position, _) in enumerate(self._rows):
            completion = self._owners[scheduled.request.index][0]
            if completion.pooler is not None:
                completion.pooler.add(position, hidden[row])

    def complete(self, tokens: list[int]) -> None:
        """Take the token of every row. Tokens of requests that have ended in the meantime are dropped."""
        chosen: dict[int, list[int]] = {}
        for (scheduled, _, samples), token in zip(self._rows, tokens, strict=True):
            if samples and not scheduled.request.is_finished:
                self.tokens[scheduled.request.index] = token
                if scheduled.drafts:
                    chosen.setdefault(scheduled.request.index, []).append(token)
        drafts = {scheduled.request.index: scheduled.drafts for scheduled, _, _ in self._rows if scheduled.drafts}
        for index, of_request in chosen.items():
            self._accept(index, drafts[index], of_request)
        for owners, scores in self._scores:
            for (sequence, place), entry in zip(owners, scores.entries(self._decoder), strict=True):
                self._score(sequence, place, drafts.get(sequence.request.index, ()), entry)

    def _accept(self, index: int, drafts: tuple[int, ...], chosen: list[int]) -> None:
        """Accept the leading drafts that are equal to the tokens chosen in their places; keep the token after them."""
        count = next((place for place, draft in enumerate(drafts) if chosen[place] != draft), len(drafts))
        if count and chosen[count] == NO_TOKEN:
            count -= 1  # the next step finds again that there is no token, and ends the request
        self.accepted[index], self.tokens[index] = count, chosen[count]

    def _score(self, sequence: Sequence, place: int, drafts: tuple[int, ...], entry: dict[int, Logprob]) -> None:
        """Add the log-probabilities of the token after the first `place` drafts, if these were accepted."""
        index = sequence.request.index
        token, accepted = self.tokens.get(index, NO_TOKEN), self.accepted.get(index, 0)
        if token >= 0 and place <= accepted:
            sequence.logprobs.append(entry)
            sequence.cumulative_logprob += entry[drafts[place] if place < accepted else token].logprob

    def _next_row(self, scheduled: ScheduledRequest) -> SamplingRow:
        """The sampling row of the request's next logits row."""
        index = scheduled.request.index
        row = self._owners[index][1].row
        if not scheduled.drafts:
            return row
        if index not in self._drafted:
            self._drafted[index] = rows_after(row, scheduled.drafts, self._may_replace, self._sources.get(index, ()))
        return next(self._drafted[index])

    def _sample(self, logits: torch.Tensor, rows: Rows[tuple[ScheduledRequest, int, bool]]) -> torch.Tensor:
        sequences = [self._owners[scheduled.request.index][1] for scheduled, _, _ in rows]
        for sequence in sequences:
            sequence.row.num_placeholders = sequence.request.num_placeholders - 1  # without the token chosen here
        sampling = [self._next_row(scheduled) for scheduled, _, _ in rows]
        scored = [place for place, s in enumerate(sequences) if s.request.params.logprobs is not None]
        processed = logits.clone() if scored and self._scores_processed else None
        tokens = self._sampler.choose(logits, sampling, processed)
        if scored:
            counts = [sequences[place].request.params.logprobs or 0 for place in scored]
            chosen = tokens
            logits = logits if processed is None else processed
            if len(scored) < len(sequences):
                places = to_device_async(scored, logits)
                logits, chosen = logits[places], tokens[places]
            if processed is not None:
                logits = drawable(logits, [sampling[place].params for place in scored])
            wanted = [sequences[place].request.params.logprob_token_ids or [] for place in scored]
            scores = TokenScores(logits, chosen, counts, wanted)
            owners = [(sequences[place], _num_drafts_before(*rows[place][:2])) for place in scored]
            self._scores.append((owners, scores))
        return tokens

    def _score_prompt(self, logits: torch.Tensor, rows: Rows[tuple[ScheduledRequest, int, bool]]) -> None:
        """The row at position p gives the log-probability of the prompt's token at p + 1."""
        for i, (scheduled, position, _) in enumerate(rows):
            request = scheduled.request
            completion = self._owners[request.index][0]
            listed = completion.prompt_logprobs
            wants = request.params.prompt_logprobs is not None and position + 1 < request.num_prompt_tokens
            # Positions may be scored already: by another sequence of the request, or before a preemption.
            if wants and listed is not None and len(listed) == position + 1:
                token = logits.new_tensor([request.prompt_token_ids[position + 1]], dtype=torch.int64)
                count = request.params.prompt_logprobs or 0
                listed += TokenScores(logits[i : i + 1], token, [count]).entries(self._decoder)


def _num_drafts_before(scheduled: ScheduledRequest, position: int) -> int:
    """How many drafted tokens precede the token that is chosen after `position`."""
    return position - (scheduled.start + scheduled.num_known_tokens - 1)
