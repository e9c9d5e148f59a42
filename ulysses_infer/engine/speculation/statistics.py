"""Counters of speculative decoding, under vLLM's names."""

from __future__ import annotations

from typing import Any


class SpeculationStats:
    """Drafted and accepted tokens since the start. Accepted tokens after the end of an output count, too."""

    def __init__(self, most: int) -> None:
        """most: the most drafted tokens of a request per step."""
        self.num_drafts = 0
        """Verified drafts: requests with drafted tokens, summed over steps."""
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.accepted_per_position = [0] * most
        """How often the draft's first, second ... token was accepted."""

    def count(self, num_drafted: int, num_accepted: int) -> None:
        """Count one verified draft."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            self.accepted_per_position[position] += 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, by the names of the metrics."""
        return {
            "spec_decode_num_drafts": self.num_drafts,
            "spec_decode_num_draft_tokens": self.num_draft_tokens,
            "spec_decode_num_accepted_tokens": self.num_accepted_tokens,
            "spec_decode_num_accepted_tokens_per_pos": list(self.accepted_per_position),
        }
