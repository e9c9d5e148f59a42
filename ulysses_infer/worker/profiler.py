"""What one rank computes over some steps, as a trace of torch's profiler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ulysses_infer.worker.step_plan import StepPlan


class Profiler:
    """Records this rank's operations between `start` and `stop`. Without them it costs nothing."""

    def __init__(self) -> None:
        self._running: profile | None = None
        self._path = Path()

    @property
    def is_running(self) -> bool:
        """Whether a trace is being recorded."""
        return self._running is not None

    def start(self, path: Path, device: torch.device) -> None:
        """Record from now on what this thread runs, and the GPU's kernels; `path` is the file of the trace."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._running, self._path = profile(activities=activities), path
        self._running.start()

    def stop(self) -> None:
        """Write the trace. Raises OSError."""
        assert self._running is not None
        running, self._running = self._running, None
        running.stop()
        running.export_chrome_trace(str(self._path))

    def annotated(self, plan: StepPlan) -> AbstractContextManager[Any]:
        """The step as an event of the trace: native kernels and replayed graphs have no events of their own."""
        if self._running is None:
            return nullcontext()
        return record_function(
            f"step {plan.sequence}: {plan.mode}, {plan.num_tokens} tokens of {len(plan.items)} requests"
        )
