"""The interface of policies, and the decision they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.request import Request
from ulysses_infer.parallel.layout import Mode


class Decision(NamedTuple):
    """The mode of one step, with the reason."""

    mode: Mode
    reason: str
    """A few words that follow the name of the mode: "more than 256 tokens"."""
    predicted: tuple[tuple[Mode, float], ...] = ()
    """Predicted seconds of the step in each mode, if the policy predicts."""
    drafts: str = ""
    """Why the step has its number of drafted tokens; "" if none were proposed."""

    def explain(self, seconds: float | None = None) -> str:
        """One line; `seconds` is the measured time."""
        parts = [f"{self.mode}: {self.reason}"]
        if self.drafts:
            parts.append(f"drafted {self.drafts}")
        if self.predicted:
            parts.append("predicted " + ", ".join(f"{mode} {time * 1e3:.2f} ms" for mode, time in self.predicted))
        if seconds is not None:
            expected = dict(self.predicted).get(self.mode)
            error = f" ({seconds / expected - 1:+.0%})" if expected else ""
            parts.append(f"took {seconds * 1e3:.2f} ms{error}")
        return "; ".join(parts)


class Policy(ABC):
    """Chooses the mode of every step. Called on rank 0 only, once per non-empty batch."""

    name: ClassVar[str]
    """The policy's name in recipes."""

    @abstractmethod
    def decide(self, batch: Batch) -> Decision:
        """The mode of `batch`, one of the loaded ones, with the reason."""

    @abstractmethod
    def candidates(self, num_tokens: int) -> Sequence[Mode]:
        """The modes of which a step of `num_tokens` tokens gets one."""

    def choose(self, batch: Batch) -> Mode:
        """The mode of `batch`."""
        return self.decide(batch).mode

    def prefill_limit(self, running: Sequence[Request], waiting: Request | None) -> int | None:
        """Most prompt tokens of the step about to be scheduled, at least 1; None: no limit.

        running: the admitted requests; waiting: the one that is admitted next.
        """
        return None

    def observe(self, batch: Batch, decision: Decision, seconds: float) -> None:
        """Called after the step of the last `decide` has run."""
        return

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The policy's name and settings as plain values; they change only with the policy."""

    def stats(self) -> dict[str, Any]:
        """Its counters as plain values."""
        return {}
