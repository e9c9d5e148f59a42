"""A smaller model that drafts tokens: a worker of its own, with its own cache, which runs ordinary step plans."""

from __future__ import annotations

from ulysses_infer.worker.step_plan import StepPlan
from ulysses_infer.worker.transfer import DeviceToHostCopy
from ulysses_infer.worker.worker import TokenChooser, Worker


class DraftModel:
    """Implements `Drafter` with a whole model.

    Its cache has block tables of its own: it can compute any text from its tokens, so that it needs no blocks of the
    served model, and no step of that one waits for it.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run(self, payload: bytes) -> None:
        """See `Drafter.run`. payload: an encoded step plan."""
        self.worker.run(StepPlan.decode(payload))

    def step(self, plan: StepPlan, choose: TokenChooser | None = None) -> DeviceToHostCopy | None:
        """Run a step on rank 0: see `Worker.run`."""
        return self.worker.run(plan, choose)

    def take_caches(self) -> None:
        """See `Drafter.take_caches`."""
        self.worker.take_caches()

    def release_caches(self) -> None:
        """See `Drafter.release_caches`."""
        self.worker.release_caches()
        for graphs in self.worker.all_graphs:
            graphs.invalidate()
