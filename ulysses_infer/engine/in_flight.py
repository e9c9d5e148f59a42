"""Steps in flight: launched on the device, their tokens not on the host yet.

While a short step runs, the next one is scheduled and launched too (`scheduler.async_scheduling`), so that a GPU never
waits for the host. Tokens that it needs and the host does not know yet are placeholders in its plan; the device fills
them in (`worker/next_tokens.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.policies import Decision
from ulysses_infer.engine.results import StepResults
from ulysses_infer.worker.step_plan import StepPlan
from ulysses_infer.worker.transfer import DeviceToHostCopy

MAX_ASYNC_TOKENS = 512  # longer steps hide the host's work anyway, and new requests would wait for one step more


@dataclass
class InFlightStep:
    """A launched step, as rank 0 sees it."""

    batch: Batch
    plan: StepPlan
    decision: Decision
    results: StepResults
    tokens: DeviceToHostCopy | None
    """One token per row that needs logits; None if there is no such row."""
    started: float
    """Time by `time.perf_counter`."""

    @property
    def may_be_followed(self) -> bool:
        """Whether the next step may be launched before this one completes."""
        return self.plan.keeps_tokens and not self.batch.lacks_room

    def complete(self) -> None:
        """Wait for the tokens and hand them to the results."""
        self.results.complete([] if self.tokens is None else self.tokens.wait())
