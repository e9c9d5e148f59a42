"""Drafts with a smaller model: what it would output after each request's text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.draft_choices import DraftChoices, SeedOf
from ulysses_infer.engine.speculation.draft_times import DraftTimes
from ulysses_infer.engine.speculation.drafted_texts import DraftedText, DraftedTexts
from ulysses_infer.engine.speculation.proposer import NOTHING, Draft, Query
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.step_shape import StepShape
from ulysses_infer.worker.drafting.draft_model import DraftModel
from ulysses_infer.worker.step_plan import (
    DRAFT_LOGITS,
    LAST_LOGITS,
    NO_LOGITS,
    PlanItem,
    StepPlan,
    placeholder,
)
from ulysses_infer.worker.transfer import DeviceToHostCopy

MOST_BY_ROW = 4  # tokens that a text may lack and still be computed as rows of a recorded step


@dataclass
class _Work:
    """One query while its tokens are drafted."""

    place: int
    query: Query
    text: DraftedText
    most: int
    """Tokens to draft."""
    missing: list[int]
    """Tokens that the draft model has not seen, the last one included."""
    row: int = 0
    """The logits row of the last drafted token, in its step."""
    tokens: list[int] = field(default_factory=list)
    """Drafted tokens, as far as they are known."""
    chance: float = 1.0
    """That all of them are right, as far as it is known."""

    def is_worth(self, number: int) -> bool:
        """Whether it is worth its time to draft token `number`."""
        least = self.query.least
        return not least or self.chance > least[number]

    @property
    def length(self) -> int:
        """Tokens before the first drafted one."""
        return self.query.request.num_tokens + len(self.query.first)


class DraftModelProposer:
    """Implements `Proposer` and `CostlyProposer` with a draft model, which all ranks run together or rank 0 alone.

    A proposal takes one step for each drafted token. The first one also computes what the draft model has not seen of
    the texts, up to the budget of a step: requests that lack more have no draft yet. On a GPU all steps are launched
    before the first token is on the host.
    """

    def __init__(
        self,
        drafter: DraftModel,
        texts: DraftedTexts,
        times: DraftTimes,
        seed_of: SeedOf,
        vocab_size: int,
        may_replace: bool,
        max_batched_tokens: int,
        send: Callable[[bytes], None],
        chained: bool | None = None,
    ) -> None:
        """seed_of: of a request's output; None: its drafts must be certain. vocab_size: of the served model.
        may_replace: for rejection sampling. send: a step plan to the other ranks that hold the model. chained: whether
        steps are launched before the tokens of earlier ones are known; None: on a GPU."""
        self._drafter, self.texts, self.times = drafter, texts, times
        self._seed_of, self._vocab_size, self._may_replace = seed_of, vocab_size, may_replace
        self._max_batched_tokens, self._send = max_batched_tokens, send
        self._chained = drafter.worker.device.type != "cpu" if chained is None else chained
        self._sequence = itertools.count()
        self.choose_mode: Callable[[StepShape], Mode] = times.fastest
        """The mode of each step of the draft model; tests and tools may replace it."""
        self._steps: list[tuple[Mode, StepShape]] = []  # of the current proposal
        self._copies: list[
            tuple[DeviceToHostCopy, list[tuple[_Work, int]]]
        ] = []  # of tokens that are not waited for yet

    def propose(self, queries: Sequence[Query]) -> list[Draft]:
        """See `Proposer.propose`."""
        choices = DraftChoices(queries, self._seed_of, self._vocab_size, self._may_replace)
        busy = {query.request.index for query in queries}
        started = time.perf_counter()
        ready = self._first_step(self._open(queries, busy), choices, busy)
        self._next_steps(ready, choices, busy)
        confidences = choices.confidences()
        self._observe(started)
        drafts = [NOTHING] * len(queries)
        for work in ready:
            work.text.ahead = [*work.query.first, *work.tokens[:-1]]  # the last one was not computed
            certain, sources = confidences[work.place], choices.sources[work.place]
            drafts[work.place] = Draft(tuple(work.tokens), tuple(certain), tuple(sources))
        return drafts

    def forget(self, request: Request) -> None:
        """See `Proposer.forget`."""
        self.texts.forget(request)

    @property
    def is_gradual(self) -> bool:
        """See `CostlyProposer.is_gradual`."""
        return not self._chained

    def draft_seconds(self, requests: Sequence[Request], count: int) -> float:
        """See `CostlyProposer.draft_seconds`."""
        missing = sum(max(0, self.texts.num_missing(request) - 1) for request in requests)
        return self.times.of_drafts([request.num_tokens for request in requests], missing, count)

    def reset(self) -> None:
        """See `CostlyProposer.reset`."""
        self.texts.reset()

    def _open(self, queries: Sequence[Query], busy: Container[int]) -> list[_Work]:
        """The queries that the draft model has room for, and what it lacks of their texts."""
        shape, works = self._drafter.worker.model.shape, []
        for place, query in enumerate(queries):
            request, first = query.request, query.first
            most = min(query.most, shape.max_model_len - request.num_tokens - len(first) + 1)
            text = self.texts.open(request, busy) if most > 0 else None
            if text is not None:
                missing = [*request.token_ids_from(text.num_cached, request.num_tokens), *first]
                if max(missing) < shape.vocab_size:  # the served model may have more rows, which are no tokens
                    works.append(_Work(place, query, text, most, missing))
        return works

    def _first_step(self, works: list[_Work], choices: DraftChoices, busy: Container[int]) -> list[_Work]:
        """Compute what is missing of the texts, and the first token of those that are complete then: returns these."""
        parts, budget = [], self._max_batched_tokens
        for work in works:
            count = min(len(work.missing), budget)
            end = work.text.num_cached + count
            blocks = self.texts.extend(work.text, end, busy) if count else None
            if blocks is not None:
                parts.append((work, count, blocks))
                budget -= count
        if not parts:
            return []
        by_row = all(count == len(work.missing) <= MOST_BY_ROW for work, count, _ in parts)
        items, places, tokens, ready = [], [], [], []
        for work, count, blocks in parts:
            logits = NO_LOGITS
            if count == len(work.missing):
                logits = DRAFT_LOGITS if by_row and count > 1 else LAST_LOGITS
                places += [None] * (count - 1 if logits == DRAFT_LOGITS else 0) + [work.place]
                work.row = len(places) - 1
                ready.append(work)
            items.append(PlanItem(work.query.request.index, work.text.num_cached, count, blocks, logits))
            tokens += work.missing[:count]
        self._run(items, tokens, ready, places, choices, 0)
        for work, count, _ in parts:
            self.texts.computed(work.text, min(work.text.num_cached + count, work.query.request.num_tokens))
        return ready

    def _next_steps(self, ready: list[_Work], choices: DraftChoices, busy: Container[int]) -> None:
        """Draft the tokens after the first one."""
        for number in range(1, max((work.most for work in ready), default=0)):
            items, tokens = [], []
            going: list[_Work] = []
            for work in ready:
                position = work.length + number - 1
                wanted = work.most > number and work.is_worth(number)
                blocks = self.texts.extend(work.text, position + 1, busy) if wanted else None
                if blocks is None:
                    work.most = min(work.most, number)
                    continue
                items.append(PlanItem(work.query.request.index, position, 1, blocks, LAST_LOGITS))
                tokens.append(placeholder(work.row) if self._chained else work.tokens[-1])
                work.row = len(going)
                going.append(work)
            if not going:
                break
            self._run(items, tokens, going, [work.place for work in going], choices, number)
        for copy, rows in self._copies:
            _store(rows, copy.wait())
        self._copies = []

    def _run(
        self,
        items: list[PlanItem],
        tokens: list[int],
        works: list[_Work],
        places: list[int | None],
        choices: DraftChoices,
        number: int,
    ) -> None:
        """Run a step on all ranks that hold the draft model. works: those with a logits row, whose token `number` it
        drafts; places: the query of each row."""
        chunks = [(item.start, item.num_tokens) for item in items if item.num_tokens > MOST_BY_ROW]
        contexts = [item.start + 1 for item in items if item.num_tokens <= MOST_BY_ROW]
        shape = StepShape.of(contexts, chunks)
        mode = self.choose_mode(shape)
        keeps = self._chained and any(work.most > number + 1 for work in works)
        dropped, array = self.texts.take_dropped(), np.array(tokens, dtype=np.int32)
        plan = StepPlan(next(self._sequence), mode, items, array, dropped, full_logits=True, keeps_tokens=keeps)
        choices.begin(places, number)
        self._send(plan.encode())
        copy = self._drafter.step(plan, choices.choose)
        self._steps.append((mode, shape))
        if copy is None:
            return
        rows = [(work, work.row) for work in works]
        if self._chained:
            self._copies.append((copy, rows))
        else:
            _store(rows, copy.wait())
            for work, confidence in zip(works, choices.last_confidences(), strict=True):
                work.chance *= min(1.0, work.query.rate * confidence)

    def _observe(self, started: float) -> None:
        """Learn how long the steps of this proposal took."""
        if self._steps:
            self.times.observe(self._steps, time.perf_counter() - started)
        self._steps = []


def _store(rows: Sequence[tuple[_Work, int]], tokens: Sequence[int]) -> None:
    """Give each work the token of its logits row."""
    for work, row in rows:
        work.tokens.append(tokens[row])
