"""Steps on their way: asked of the device, their tokens not on the host yet.

While a short step runs, the next is scheduled and asked for too (`scheduler.async_scheduling`), so that a GPU never
waits for the host. The tokens that it begins with are on the device by then, and are filled in there (`feed.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.policies import Decision
from ulysses_infer.engine.results import StepResults
from ulysses_infer.worker.step_plan import StepPlan
from ulysses_infer.worker.transfer import DeviceToHostCopy

MAX_ASYNC_TOKENS = (
    512  # tokens; longer steps hide what the host does, and requests that come meanwhile would wait for one more
)


@dataclass
class InFlightStep:
    """A step on its way, as rank 0 sees it."""

    batch: Batch
    plan: StepPlan
    decision: Decision
    results: StepResults
    arrival: DeviceToHostCopy | None
    """Of a token for each row that needs logits; None without any."""
    started: float
    """Moment, by `time.perf_counter`."""

    @property
    def may_be_followed(self) -> bool:
        """Whether another step may be asked for before its tokens are here."""
        return self.plan.keeps_tokens and not self.batch.lacks_room

    def complete(self) -> None:
        """Wait for the step's tokens and give them to its results."""
        self.results.complete([] if self.arrival is None else self.arrival.wait())
