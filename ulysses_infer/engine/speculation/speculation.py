"""Speculation of the engine: drafts before a step, what became of them after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ulysses_infer.config import SpeculationConfig
from ulysses_infer.config.speculation import AUTO
from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.acceptance import Acceptance, SharedAcceptance
from ulysses_infer.engine.speculation.draft_planner import DraftPlanner
from ulysses_infer.engine.speculation.head_proposer import HeadProposer
from ulysses_infer.engine.speculation.ngram import NgramProposer
from ulysses_infer.engine.speculation.proposer import NOTHING, CostlyProposer, Draft, Proposer, Query
from ulysses_infer.engine.speculation.statistics import SpeculationStats
from ulysses_infer.engine.speculation.step_times import StepTimes
from ulysses_infer.engine.speculation.suffix import SuffixProposer
from ulysses_infer.model.sampling.row import Grammar

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 8
"""Most steps until a request is asked for again whose proposals were not worth their time; or for which there were
none, if steps are launched ahead."""
LONGEST_PAUSE_IN_TURN = 2
"""The same for a request for which there were none, if each step waits for the previous one."""


@dataclass
class _Drafted:
    """What is known of one request."""

    acceptance: Acceptance
    usual: Acceptance
    """The same without regard to confidences, which are not known before drafting."""
    reach: int
    """The most tokens to propose: it will not get many more than it got last."""
    offered: Draft = NOTHING
    """The proposal of the step that is being scheduled or runs."""
    next_try: int = 0
    """The step from which on tokens are proposed again."""
    pause: int = 1
    last_step: int = 0
    """The step up to which the acceptance has been told of steps without drafts."""


class Speculation:
    """Drafts tokens on rank 0. Outputs never depend on it, so it may read the clock and what it has measured."""

    def __init__(
        self,
        config: SpeculationConfig,
        grammar_of: Callable[[Request], Grammar | None],
        times: StepTimes,
        max_batched_tokens: int,
        proposer: Proposer | None = None,
        runs_ahead: bool = False,
    ) -> None:
        """grammar_of: the grammar of an unfinished request. proposer: instead of the configured one. runs_ahead:
        whether a step may be launched before the previous one's tokens are known, unless tokens are proposed after
        it; a request for which nothing was drafted then pauses longer."""
        self.config, self._grammar_of, self.times = config, grammar_of, times
        self.stats = SpeculationStats(config.max_drafted)
        self.reason = ""
        """Why the last step had its number of drafted tokens."""
        self.sources: Mapping[int, Sequence[torch.Tensor | None]] = {}
        """What the drafted tokens of the last step were drawn from (`Draft.sources`), by request index."""
        self._proposer = proposer or _make_proposer(config)
        self._costly = self._proposer if isinstance(self._proposer, CostlyProposer) else None  # the check takes long
        self._planner = DraftPlanner(times.predict, lambda: times.aims_at_tpot)
        self._max_batched_tokens = min(max_batched_tokens, config.max_batched_tokens or max_batched_tokens)
        self._longest_pause = LONGEST_PAUSE if runs_ahead else LONGEST_PAUSE_IN_TURN
        self._requests: dict[int, _Drafted] = {}
        self._all, self._usual = SharedAcceptance(), SharedAcceptance()
        self._step = 0

    def draft(self, running: Sequence[Request], waiting: Request | None) -> dict[int, tuple[int, ...]]:
        """The tokens to verify in the next step, by request index. running: the admitted requests; waiting: the one
        that is admitted next."""
        self.reason, self.sources = "", {}
        decoding = [request for request in running if request.num_tokens_left == 1 and request.num_output_tokens]
        queries = [query for query in map(self._query, decoding) if query is not None]
        if not queries:
            return {}
        chunks = _expected_chunks(running, waiting, self._max_batched_tokens)
        drafts = self._propose(self._worth_their_time(queries, decoding, chunks))
        counts = self._choose_counts(drafts, decoding, chunks)
        for query in queries:
            self._plan_next_try(query.request.index, counts)
        self.sources = {index: drafts[index].sources[:count] for index, count in counts.items() if count}
        return {index: drafts[index].tokens[:count] for index, count in counts.items() if count}

    def is_due(self, batch: Batch) -> bool:
        """Whether tokens are to be proposed after `batch` for one of its requests, once its tokens are known."""
        if isinstance(self._proposer, HeadProposer):
            return True  # the head follows every step before the next one overwrites the hidden states
        return any(
            item.samples and item.request.params.speculation and self._of(item.request).next_try <= self._step + 1
            for item in batch.scheduled
        )

    def observe(self, batch: Batch, accepted: Mapping[int, int]) -> None:
        """Learn from a step that has run. accepted: drafted tokens accepted, by request index."""
        self._step += 1
        if isinstance(self._proposer, HeadProposer):
            self._proposer.observe(batch, accepted)
        for item in batch.scheduled:
            count = accepted.get(item.request.index)
            if not item.drafts or count is None:
                continue
            self.stats.count(len(item.drafts), count)
            known = self._requests.get(item.request.index)
            if known is not None:
                confidences = known.offered.confidences[: len(item.drafts)]
                known.acceptance.observe(confidences, count)
                known.usual.observe([1.0] * len(item.drafts), count)

    def reset_stats(self) -> None:
        """Set the counters to zero."""
        self.stats = SpeculationStats(self.config.max_drafted)

    def reset_caches(self) -> None:
        """The memory of the caches is gone: a proposer with one starts anew."""
        if self._costly is not None:
            self._costly.reset()

    def forget(self, request: Request) -> None:
        """`request` has ended."""
        self._requests.pop(request.index, None)
        self._proposer.forget(request)

    def _of(self, request: Request) -> _Drafted:
        known = self._requests.get(request.index)
        if known is None:
            known = self._requests[request.index] = _Drafted(
                Acceptance(self._all), Acceptance(self._usual), self.config.max_drafted, last_step=self._step
            )
        return known

    def _query(self, request: Request) -> Query | None:
        """What to ask the proposer about a decoding request; None if it is not its turn."""
        most = min(self.config.max_drafted, request.max_tokens_left - 1)
        if not request.params.speculation or most < 1:
            return None
        known = self._of(request)
        if known.next_try > self._step:
            return None
        known.acceptance.skip(self._step - known.last_step)
        known.usual.skip(self._step - known.last_step)
        known.last_step = self._step
        first = self._forced_tokens(request)[:most]
        return Query(request, first, min(most - len(first), known.reach))

    def _worth_their_time(
        self, queries: list[Query], decoding: Sequence[Request], chunks: list[tuple[int, int]]
    ) -> list[Query]:
        """`queries` for as many tokens as give the most tokens per second, with the time of drafting them."""
        proposer = self._costly
        if self.config.num_tokens != AUTO or proposer is None:
            return queries
        rates = {query.request.index: min(1.0, self._of(query.request).usual.rate) for query in queries}
        requests, contexts = [query.request for query in queries], {r.index: r.num_tokens for r in decoding}
        most = max(query.most for query in queries)
        length = self._planner.best_length(rates, contexts, chunks, most, lambda n: proposer.draft_seconds(requests, n))
        if not length.num_tokens:
            self.reason = "drafting is not worth its time"
            return [query._replace(most=0) for query in queries]
        return [
            query._replace(
                most=query.most if proposer.is_gradual else min(length.num_tokens, query.most),
                rate=self._of(query.request).acceptance.rate,
                least=length.least,
            )
            for query in queries
        ]

    def _forced_tokens(self, request: Request) -> tuple[int, ...]:
        """The tokens that the request's grammar forces next."""
        grammar = self._grammar_of(request)
        try:
            return () if grammar is None else grammar.forced_tokens(request.output_token_ids)
        except Exception:  # of the grammar library; the request's own row finds it again and ends the request
            logger.debug("nothing is drafted for request %s", request.request_id, exc_info=True)
            return ()

    def _propose(self, queries: list[Query]) -> dict[int, Draft]:
        """The proposals, with forced tokens in front and without what cannot be accepted."""
        proposals = self._proposer.propose(queries)
        drafts = {}
        for query, proposed in zip(queries, proposals, strict=True):
            draft = proposed.after(query.first)
            drafts[query.request.index] = self._of(query.request).offered = self._possible(query.request, draft)
        return drafts

    def _possible(self, request: Request, draft: Draft) -> Draft:
        """`draft` up to the first token that ends the output or that the grammar forbids."""
        endings = request.ending_token_ids
        count = next((place for place, token in enumerate(draft.tokens) if token in endings), len(draft.tokens))
        grammar = self._grammar_of(request)
        try:
            if grammar is not None and count:
                count = grammar.count_allowed(request.output_token_ids, draft.tokens[:count])
        except Exception:  # as above
            logger.debug("nothing is drafted for request %s", request.request_id, exc_info=True)
            count = 0
        return draft.upto(count)

    def _choose_counts(
        self, drafts: Mapping[int, Draft], decoding: Sequence[Request], chunks: list[tuple[int, int]]
    ) -> dict[int, int]:
        """How many tokens of each draft the next step verifies, by request index."""
        room = self._max_batched_tokens - len(decoding) - sum(count for _, count in chunks)
        if not any(draft.tokens for draft in drafts.values()):
            return {}
        if self.config.num_tokens != AUTO:
            return _share(room, {index: len(draft.tokens) for index, draft in drafts.items()})
        gains = {index: self._requests[index].acceptance.gains(draft.confidences) for index, draft in drafts.items()}
        contexts = {request.index: request.num_tokens for request in decoding}
        plan = self._planner.plan(gains, contexts, chunks, max(0, room))
        self.reason = plan.reason
        return plan.counts

    def _plan_next_try(self, index: int, counts: Mapping[int, int]) -> None:
        """Ask again in the next step if something was drafted, else after a pause, which becomes longer where asking
        holds up steps."""
        known = self._requests[index]
        if counts.get(index):
            known.pause, known.last_step = 1, self._step + 1
            if self.config.num_tokens == AUTO:
                known.reach = 2 * counts[index] + 2
        elif known.offered.tokens:
            known.pause = min(2 * known.pause, LONGEST_PAUSE)
            # Or such tokens would be drafted again and again, and never verified.
            known.usual.expect(*known.acceptance.gains(known.offered.confidences[:1]))
        else:
            known.pause = min(2 * known.pause, self._longest_pause)
        known.next_try = self._step + known.pause


def _make_proposer(config: SpeculationConfig) -> Proposer:
    if config.method == "ngram":
        return NgramProposer(config.min_match, config.max_match)
    return SuffixProposer(
        config.min_match, config.max_match, config.max_shared_tokens if config.share_outputs else None
    )


def _expected_chunks(running: Sequence[Request], waiting: Request | None, budget: int) -> list[tuple[int, int]]:
    """(start, tokens) of the prefill chunks that the next step will have, as far as can be said before it is
    scheduled."""
    chunks = []
    for request in [*running, *([] if waiting is None else [waiting])]:
        count = min(request.num_tokens_left, budget)
        if count > 1:
            chunks.append((request.num_computed_tokens, count))
            budget -= count
    return chunks


def _share(room: int, wanted: Mapping[int, int]) -> dict[int, int]:
    """Divide `room` tokens over requests in order, at most what each wants."""
    counts = {}
    for index, count in wanted.items():
        counts[index] = max(0, min(count, room))
        room -= counts[index]
    return counts
