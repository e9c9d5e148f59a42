"""One rank, ready to run steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ulysses_infer.model.loading.staging import WeightTransfer
from ulysses_infer.model.loading.weights import Weights
from ulysses_infer.parallel.groups import ProcessGroups
from ulysses_infer.worker.channel import Channel
from ulysses_infer.worker.cores import PinnedCores
from ulysses_infer.worker.memory import return_freed_memory
from ulysses_infer.worker.worker import Worker


@dataclass
class Rank:
    """One rank, ready to run steps."""

    worker: Worker
    channel: Channel
    groups: ProcessGroups
    weights: Weights
    folder: Path | None
    """The folder of the checkpoint's config, where the tokenizer is too; None for a model given in memory."""
    pinned: PinnedCores | None = None
    transfer: WeightTransfer = field(default_factory=WeightTransfer)
    silent: Callable[[], AbstractContextManager[None]] = nullcontext
    """Tells those who watch this process that it may send nothing inside: a call that keeps Python's global lock."""

    def close(self) -> None:
        """Leave the groups, the cores that this rank kept to, and the memory. Not collective."""
        self.groups.close()
        self.release_cores()
        self.worker.release_caches()
        if self.worker.device.type == "cpu":
            return_freed_memory()

    def release_cores(self) -> None:
        """Run on any core again."""
        if self.pinned is not None:
            self.pinned.release()
