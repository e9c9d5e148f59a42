"""The threshold policy: one mode above a number of tokens, another below (Algorithm 2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.policies.policy import Decision, Policy
from ulysses_infer.parallel.layout import Mode


class ThresholdPolicy(Policy):
    """The base mode for steps of more than `threshold_tokens` tokens, the shift mode for others.

    Large steps are limited by computation and communication, which sequence parallelism makes cheaper. Small steps are
    limited by reading weights, which tensor parallelism splits over all ranks. Source: Hidayetoglu et al., "Shift
    Parallelism", arXiv 2509.16495, Algorithm 2.
    """

    name = "threshold"

    def __init__(self, base: Mode, shift: Mode, threshold_tokens: int) -> None:
        self.base = base
        self.shift = shift
        self.threshold_tokens = threshold_tokens
        self._large = Decision(base, f"more than {threshold_tokens} tokens")
        self._small = Decision(shift, f"at most {threshold_tokens} tokens")

    def decide(self, batch: Batch) -> Decision:
        """By the number of batched tokens: prefill, decode and drafted ones together."""
        return self._large if batch.num_tokens > self.threshold_tokens else self._small

    def candidates(self, num_tokens: int) -> Sequence[Mode]:
        """The mode for this number of tokens, drafted ones included."""
        return (self.base if num_tokens > self.threshold_tokens else self.shift,)

    def describe(self) -> dict[str, Any]:
        """Name, threshold and the two modes."""
        return {
            "name": self.name,
            "threshold_tokens": self.threshold_tokens,
            "base": list(self.base),
            "shift": list(self.shift),
        }
