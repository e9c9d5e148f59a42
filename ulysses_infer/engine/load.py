"""The load of a replica, by which the router chooses."""

from __future__ import annotations

from collections.abc import Iterable

SEQUENCE_TOKENS = 64
"""Load of one decoding sequence, in waiting prompt tokens."""


def outstanding_tokens(requests: Iterable[tuple[int, int]]) -> int:
    """Load of unfinished requests, each given as (unfinished sequences, prompt tokens without output yet)."""
    return sum(SEQUENCE_TOKENS * sequences + prompt_tokens for sequences, prompt_tokens in requests)
