"""Proposes what a head drafts from the hidden states of the served model: multi-token prediction, EAGLE-3."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ulysses_infer.engine.batch import Batch, ScheduledRequest
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.proposer import NOTHING, Draft, Query
from ulysses_infer.worker.drafting.messages import Chain, Follow, encode
from ulysses_infer.worker.transfer import DeviceToHostCopy

WEIGHT_OF_LAST = 0.1  # of the last observed time in the running mean
Send = Callable[[bytes], Sequence[DeviceToHostCopy]]
"""Gives a message to the heads of all ranks; returns what rank 0's has drafted."""


class HeadProposer:
    """Implements `Proposer` with a head on every rank.

    The head's keys and values of a token are computed after the step that has computed the token, because they need its
    hidden state, whether or not anything is drafted.
    """

    def __init__(self, send: Send, most: int) -> None:
        """most: the most tokens to draft at a time."""
        self._send, self._most = send, most
        self._places: dict[int, int] = {}
        """Of each request at whose end the head can go on, by its index: its place in `Follow.drafting`."""
        self._seconds = 0.0
        """Observed time of drafting one token for each request of a step."""

    def observe(self, batch: Batch, accepted: Mapping[int, int]) -> None:
        """Let the heads follow a step, whose tokens are known. accepted: drafted tokens accepted, by request index."""
        ends = [_end_of(item, accepted) for item in batch.scheduled]
        drafting = [number for number, item in enumerate(batch.scheduled) if _continues(item)]
        self._places = {batch.scheduled[number].request.index: place for place, number in enumerate(drafting)}
        self._send(encode(Follow([row for row, _ in ends], [token for _, token in ends], drafting)))

    def propose(self, queries: Sequence[Query]) -> list[Draft]:
        """See `Proposer.propose`. A request with tokens that a grammar forces has no proposal behind them."""
        asked = {query.request.index for query in queries if query.most and not query.first}
        picked = {index: place for index, place in self._places.items() if index in asked}
        if not picked:
            return [NOTHING] * len(queries)
        count = min(self._most, max(query.most for query in queries if query.request.index in picked))
        started = time.perf_counter()
        rows = [copy.wait() for copy in self._send(encode(Chain(list(picked.values()), count)))]
        self._observe_time(time.perf_counter() - started, count)
        drafted = dict(zip(picked, zip(*rows, strict=True), strict=False))
        return [_draft(drafted.get(query.request.index, ()), query.most) for query in queries]

    @property
    def is_gradual(self) -> bool:
        """See `CostlyProposer.is_gradual`."""
        return False

    def draft_seconds(self, requests: Sequence[Request], count: int) -> float:
        """See `CostlyProposer.draft_seconds`. That the head follows every step costs the same if nothing is drafted."""
        return self._seconds * count

    def reset(self) -> None:
        """See `CostlyProposer.reset`."""
        self._places.clear()

    def _observe_time(self, seconds: float, count: int) -> None:
        """Learn from drafting `count` tokens in `seconds`."""
        self._seconds += (seconds / count - self._seconds) * (WEIGHT_OF_LAST if self._seconds else 1.0)

    def forget(self, request: Request) -> None:
        """See `Proposer.forget`."""
        self._places.pop(request.index, None)


def _draft(tokens: Sequence[int], most: int) -> Draft:
    """How likely the tokens are is learned from how many are accepted."""
    return Draft(tuple(tokens[:most]), (1.0,) * min(most, len(tokens)))


def _continues(item: ScheduledRequest) -> bool:
    """Whether the request goes on to decode."""
    request = item.request
    return item.samples and not request.is_finished and request.num_tokens_left == 1


def _end_of(item: ScheduledRequest, accepted: Mapping[int, int]) -> tuple[int, int]:
    """The row of the request's last token in its part of the step that belongs to the text, and the token after it.

    For a request that has ended, the token does not matter.
    """
    row = item.num_known_tokens - 1 + accepted.get(item.request.index, 0)
    position = item.start + row + 1
    following = item.request.token_ids_from(position, position + 1)
    return row, following[0] if following else 0
