"""The slots of recurrent states around a step: cleared or restored before it, saved as snapshots after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ulysses_infer.cache.states import StateCache
from ulysses_infer.worker.block_tables import StepArrays
from ulysses_infer.worker.step_plan import StepPlan
from ulysses_infer.worker.transfer import make_inputs


class StateSlots:
    """Applies what step plans say about the slots of a rank's states."""

    def __init__(self, states: StateCache) -> None:
        self._states = states
        self._inputs = make_inputs(states.device)  # of its own: those of a step may not wait for these

    def prepare(self, plan: StepPlan, arrays: StepArrays) -> None:
        """Before a step: clear the slots of sequences that start, restore those that start after a cached prefix or go
        back to before drafted tokens, save those that have drafted tokens now."""
        fresh = [int(row) for item, row in zip(plan.items, arrays.rows, strict=True) if item.start == 0]
        if fresh:
            self._states.clear(*self._inputs.send([np.array(fresh, dtype=np.int64)]))
        if plan.restores:
            snapshots, slots = self._pairs(plan, arrays, plan.restores)
            self._states.copy(*self._inputs.send([snapshots, slots]))
        if plan.checkpoints:
            snapshots, slots = self._pairs(plan, arrays, plan.checkpoints)
            self._states.copy(*self._inputs.send([slots, snapshots]))

    def save(self, plan: StepPlan, arrays: StepArrays) -> None:
        """After a step: copy states to their snapshots."""
        if plan.snapshots:
            snapshots, slots = self._pairs(plan, arrays, plan.snapshots)
            self._states.copy(*self._inputs.send([slots, snapshots]))

    def _pairs(
        self, plan: StepPlan, arrays: StepArrays, wanted: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Snapshot slots and sequence slots of `wanted`: (handle, snapshot slot) each."""
        row_of = {item.handle: row for item, row in zip(plan.items, arrays.rows, strict=True)}
        snapshots = np.array([snapshot for _, snapshot in wanted], dtype=np.int64)
        return snapshots, np.array([row_of[handle] for handle, _ in wanted], dtype=np.int64)
