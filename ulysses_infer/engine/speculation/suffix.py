"""Suffix decoding: proposes what followed a text's last tokens most often, in the text itself and in recent outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.ngram import OwnTexts, tail_of
from ulysses_infer.engine.speculation.proposer import NOTHING, Draft, Query
from ulysses_infer.engine.speculation.token_index import SEPARATOR, TokenIndex

TOKENS_PER_MATCH = 4  # drafted tokens per token that agrees: short matches are chance
MOST_SALTS = 64  # sets of shared outputs; the least recently used is dropped


class SharedOutputs:
    """Outputs of ended requests. The older half is dropped when there are too many tokens."""

    def __init__(self, max_tokens: int) -> None:
        self.index = TokenIndex()
        self._max_tokens = max_tokens
        self._outputs: list[list[int]] = []

    def add(self, token_ids: Sequence[int]) -> None:
        """Add an output."""
        output = list(token_ids)[-self._max_tokens :]
        self._outputs.append(output)
        if len(self.index) + len(output) >= self._max_tokens:
            self._outputs = self._outputs[len(self._outputs) // 2 :]
            self.index = TokenIndex()
            for kept in self._outputs[:-1]:
                self.index.extend([*kept, SEPARATOR])
        self.index.extend([*output, SEPARATOR])


class SuffixProposer:
    """Implements `Proposer`. Of the request's own text and the shared outputs, the one with the higher expected number
    of right tokens proposes.

    Source: Oliaro et al., "SuffixDecoding", arXiv 2411.04975: the most frequent continuation of the longest match,
    limited to a multiple of its length.
    """

    def __init__(self, min_match: int, max_match: int, max_shared_tokens: int | None) -> None:
        """min_match, max_match: in tokens, at least 2. max_shared_tokens: per set of requests that may share outputs
        (those of one `cache_salt`); None: requests share nothing."""
        self._min_match, self._max_match, self._max_shared = min_match, max_match, max_shared_tokens
        self._texts = OwnTexts()
        self._shared: OrderedDict[str, SharedOutputs] = OrderedDict()

    def propose(self, queries: Sequence[Query]) -> list[Draft]:
        """See `Proposer.propose`."""
        return [self._propose(query) for query in queries]

    def forget(self, request: Request) -> None:
        """See `Proposer.forget`. Its output is kept for other requests."""
        self._texts.forget(request)
        if self._max_shared is None or not request.output_token_ids:
            return
        salt = request.cache_salt
        if salt not in self._shared:
            self._shared[salt] = SharedOutputs(self._max_shared)
        self._shared.move_to_end(salt)
        self._shared[salt].add(request.output_token_ids)
        if len(self._shared) > MOST_SALTS:
            self._shared.popitem(last=False)

    def _propose(self, query: Query) -> Draft:
        own = self._texts.index_of(query.request)
        tail = tail_of(own, query.first, self._max_match)
        draft = self._from(own, tail, query.most)
        shared = self._shared.get(query.request.cache_salt)
        if shared is None:
            return draft
        other = self._from(shared.index, tail, query.most)
        return other if _expected(other) > _expected(draft) else draft

    def _from(self, index: TokenIndex, tail: np.ndarray, most: int) -> Draft:
        match = index.find(tail, self._min_match)
        if match is None:
            return NOTHING
        tokens, shares = index.follow(match.places, min(most, TOKENS_PER_MATCH * match.length))
        return Draft(tuple(tokens), tuple(shares))


def _expected(draft: Draft) -> float:
    """The number of right tokens, if the shares are their probabilities."""
    expected, chance = 0.0, 1.0
    for share in draft.confidences:
        chance *= share
        expected += chance
    return expected
