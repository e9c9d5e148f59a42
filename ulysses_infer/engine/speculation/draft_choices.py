"""Which tokens are drafted, given the logits of a draft model; on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.proposer import Query
from ulysses_infer.model.sampling.draw import draw, draw_from, masses_of
from ulysses_infer.model.sampling.seeds import draft_number, uniform
from ulysses_infer.model.sampling.transfer import to_device_async
from ulysses_infer.worker.transfer import DeviceToHostCopy

SeedOf = Callable[[Request], int | None]
"""The seed of a request's output, None if a drafted token of it must not depend on chance."""


class _Row(NamedTuple):
    """A logits row that drafts a token."""

    place: int
    """The place of its query."""
    request: Request
    position: int
    """Index of the drafted token in the output."""
    seed: int | None

    @property
    def is_greedy(self) -> bool:
        return self.request.params.is_greedy or self.seed is None


class DraftChoices:
    """Chooses the tokens of one proposal, step by step, for all its queries.

    Greedy requests get the most likely token. Others get one that is drawn as the served model's is, by the random
    number of the same position: the more alike the two distributions, the more often both draw the same token. For
    rejection sampling, tokens are drawn by numbers of their own, and their distributions are kept.
    """

    def __init__(self, queries: Sequence[Query], seed_of: SeedOf, vocab_size: int, may_replace: bool) -> None:
        """seed_of: see there. vocab_size: tokens of the served model. may_replace: for rejection sampling."""
        self._queries, self._vocab_size, self._may_replace = queries, vocab_size, may_replace
        self._seeds = [seed_of(query.request) for query in queries]
        self._rows: list[_Row | None] = []
        self._confidences: list[tuple[list[int], torch.Tensor]] = []
        self._first = 0  # of those of the current step
        self.sources: list[list[torch.Tensor | None]] = [[] for _ in queries]
        """For each query, what its tokens were drawn from; None: they were certain."""

    def begin(self, places: Sequence[int | None], number: int) -> None:
        """The next step's logits rows draft token `number` of the queries at `places`; None: a row drafts nothing."""
        self._first = len(self._confidences)
        self._rows = [None if place is None else self._row(place, number) for place in places]

    def choose(self, start: int, logits: torch.Tensor) -> torch.Tensor:
        """The tokens of logits rows `[start, start + n)`: [n] int64; arbitrary for rows that draft nothing.

        logits: [n, V] float32.
        """
        rows = self._rows[start : start + len(logits)]
        drafting = [index for index, row in enumerate(rows) if row is not None]
        tokens = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        if drafting:
            scores = logits[to_device_async(drafting, logits), : self._vocab_size]
            tokens[to_device_async(drafting, logits)] = self._choose(scores, [row for row in rows if row is not None])
        return tokens

    def confidences(self) -> list[list[float]]:
        """For each query, the draft model's probability of its tokens, 1 for those that were drawn. Waits for them."""
        found: list[list[float]] = [[] for _ in self._queries]
        if self._confidences:
            places = [place for each, _ in self._confidences for place in each]
            values = DeviceToHostCopy(torch.cat([values for _, values in self._confidences])).wait()
            for place, value in zip(places, values, strict=True):
                found[place].append(value)
        return found

    def last_confidences(self) -> list[float]:
        """Those of the tokens of the last step, in the order of its rows. Waits for them."""
        return [value for _, values in self._confidences[self._first :] for value in values.tolist()]

    def _row(self, place: int, number: int) -> _Row:
        query = self._queries[place]
        position = query.request.num_output_tokens + len(query.first) + number
        return _Row(place, query.request, position, self._seeds[place])

    def _choose(self, scores: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
        """One token per row of `scores: [m, V]`."""
        if self._may_replace:
            _exclude_endings(scores, rows)
        peak, tokens = scores.max(-1)
        confidences = torch.exp(peak - scores.logsumexp(-1))
        drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
        if drawn:
            chosen = to_device_async(drawn, scores)
            tokens[chosen] = self._draw(scores[chosen], peak[chosen], [rows[index] for index in drawn])
            confidences[chosen] = 1.0
        self._confidences.append(([row.place for row in rows], confidences))
        for row in rows:
            if row.is_greedy or not self._may_replace:
                self.sources[row.place].append(None)
        return tokens

    def _draw(self, scores: torch.Tensor, peak: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
        params = [row.request.params for row in rows]
        if not self._may_replace:
            return draw(scores, peak, params, [uniform(row.seed or 0, row.position) for row in rows])
        each = masses_of(scores, peak, params)
        for row, source in zip(rows, F.pad(each, (0, self._vocab_size - each.shape[1])), strict=True):
            self.sources[row.place].append(source)
        return draw_from(each, [draft_number(row.seed or 0, row.position) for row in rows])


def _exclude_endings(scores: torch.Tensor, rows: list[_Row]) -> None:
    """Never draft a token that ends an output: it would not be verified, and with rejection sampling, a drawn token
    must be verified whatever it is."""
    for index, row in enumerate(rows):
        endings = [token for token in row.request.ending_token_ids if token < scores.shape[1]]
        if endings and not row.is_greedy:
            scores[index, to_device_async(endings, scores)] = -torch.inf
