"""The order in which replicas are asked to take a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A replica as the choice sees it."""

    replica: str
    num_cached_tokens: int
    """Of the request's prompt."""
    outstanding_tokens: int
    """Its load; see `engine.load`."""
    usage: float = 0.0
    """Of its cache, 0 to 1: breaks ties, as in a job's own router."""
    num_known_blocks: int = 0
    """Cached blocks; breaks further ties, so that unrelated prompts spread over idle replicas."""
    was_tried: bool = False
    """Whether the request has failed there."""
    affinity: bytes = b""
    """To the request's cache key, if it has one: the replica with the greatest is preferred; see `server.router`."""


def preferred(candidates: Sequence[Candidate], balance_tokens: int | None) -> list[str]:
    """The replicas, best first: those not tried, by affinity, then by the longest cached prefix, then by load.

    A replica with more than `balance_tokens` outstanding tokens above the least loaded one comes after those with
    fewer, whatever it has cached: else one popular prefix would draw all requests to one replica. None: by load only.
    """
    least = min((each.outstanding_tokens for each in candidates), default=0)

    def key(candidate: Candidate) -> tuple[bool, int, int, float, int]:
        excess = candidate.outstanding_tokens - least
        is_overloaded = balance_tokens is not None and excess > balance_tokens
        cached = 0 if balance_tokens is None or is_overloaded else candidate.num_cached_tokens
        load = candidate.outstanding_tokens
        return is_overloaded, -cached, load, candidate.usage, candidate.num_known_blocks

    ordered = sorted(sorted(candidates, key=key), key=lambda each: each.affinity, reverse=True)
    return [each.replica for each in sorted(ordered, key=lambda each: each.was_tried)]
