"""The static policy: the same mode for every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.policies.policy import Decision, Policy
from ulysses_infer.parallel.layout import Mode


class StaticPolicy(Policy):
    """Always the same mode: plain TP, plain Ulysses SP, or a fixed mixture.

    Source: the baselines (TP, SP) of Hidayetoglu et al., "Shift Parallelism", arXiv 2509.16495.
    """

    name = "static"

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._decision = Decision(mode, "the mode of policy static")

    def decide(self, batch: Batch) -> Decision:
        """`mode`, for every batch."""
        return self._decision

    def candidates(self, num_tokens: int) -> Sequence[Mode]:
        """`mode`."""
        return (self.mode,)

    def describe(self) -> dict[str, Any]:
        """Name and mode."""
        return {"name": self.name, "mode": list(self.mode)}
