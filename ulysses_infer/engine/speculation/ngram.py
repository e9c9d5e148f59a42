"""Prompt lookup: proposes what followed the latest earlier occurrence of a text's last tokens in the text itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.proposer import NOTHING, Draft, Query
from ulysses_infer.engine.speculation.token_index import TokenIndex


class OwnTexts:
    """The text of every request that is drafted for, prompt and output."""

    def __init__(self) -> None:
        self._indices: dict[int, TokenIndex] = {}

    def index_of(self, request: Request) -> TokenIndex:
        """The index of the known tokens of `request`."""
        index = self._indices.setdefault(request.index, TokenIndex())
        index.extend(request.token_ids_from(len(index), request.num_tokens))
        return index

    def forget(self, request: Request) -> None:
        """Drop the text of a request."""
        self._indices.pop(request.index, None)


class NgramProposer:
    """Implements `Proposer`. Of several occurrences the one that agrees with most tokens counts, then the latest.

    Source: Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with Reference", arXiv 2304.04487.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        """min_match, max_match: in tokens, at least 2."""
        self._min_match, self._max_match = min_match, max_match
        self._texts = OwnTexts()

    def propose(self, queries: Sequence[Query]) -> list[Draft]:
        """See `Proposer.propose`."""
        return [self._propose(query) for query in queries]

    def forget(self, request: Request) -> None:
        """See `Proposer.forget`."""
        self._texts.forget(request)

    def _propose(self, query: Query) -> Draft:
        index = self._texts.index_of(query.request)
        match = index.find(tail_of(index, query.first, self._max_match), self._min_match)
        if match is None:
            return NOTHING
        tokens, shares = index.follow(match.places[-1:], query.most)
        return Draft(tuple(tokens), tuple(shares))


def tail_of(index: TokenIndex, more: tuple[int, ...], count: int) -> np.ndarray:
    """The last `count` tokens of a text that goes on with `more`."""
    if not more:
        return index.last(count)
    return np.concatenate([index.last(count), np.array(more, dtype=np.int64)])[-count:]
