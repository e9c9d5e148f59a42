"""Commands for reinforcement learning, run by rank 0 between steps: pauses, new weights and sleep.

The names and meanings are those of vLLM's routes for this. The cache is salted with the number of weight updates, so
that no request reads prefixes that older weights have computed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from ulysses_infer.engine import operations
from ulysses_infer.engine.completion import Completion
from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import RequestError
from ulysses_infer.job import weight_transfer
from ulysses_infer.job.weights import sleep, update_weights, wake_up
from ulysses_infer.server.calls import call_all_ranks
from ulysses_infer.server.messages import Submit

ABORT, WAIT, KEEP = "abort", "wait", "keep"
PAUSE_MODES = (ABORT, WAIT, KEEP)
JOIN_SECONDS = 300.0


class Control:
    """Whether steps run, and which weights they use. `report` sends the news of requests to their clients."""

    def __init__(
        self, engine: Engine, report: Callable[[list[Completion]], None], submit: Callable[[Submit], None]
    ) -> None:
        self._engine, self._report, self._submit = engine, report, submit
        self.is_paused = False
        """No step runs, and new requests are held."""
        self.holds = False
        """New requests are held: until the running ones have ended, or while paused."""
        self.held: list[Submit] = []
        self.weight_version: str | None = None
        """The version of the weights as the trainer calls it; None until it was set."""
        self._num_updates = 0
        self._clears_cache = True

    # -- pauses ------------------------------------------------------------------------------------------------

    def pause(self, mode: str = ABORT, clear_cache: bool = True) -> dict[str, Any]:
        """Stop running steps. abort: end all requests; wait: once they have ended; keep: they go on after `resume`.

        clear_cache: the cache of kept requests is given up, and computed again with the weights of then.
        """
        if mode not in PAUSE_MODES:
            raise RequestError(f"mode is {mode!r}; use {', '.join(PAUSE_MODES)}")
        self._report(self._engine.settle())
        if mode == ABORT:
            self._report(self._engine.abort_all())
        self.holds, self._clears_cache = True, clear_cache
        if mode != WAIT:
            self._begin_pause()
        self.after_step()
        return {"is_paused": self.is_paused}

    def after_step(self) -> bool:
        """Begin the pause, if it waits for the last request and that has ended; returns whether it begins."""
        if not self.holds or self.is_paused or self._engine.has_unfinished:
            return False
        self._begin_pause()
        return True

    def _begin_pause(self) -> None:
        self.is_paused = True
        if self._clears_cache:
            operations.recompute_running(self._engine)

    def resume(self) -> dict[str, Any]:
        """Run steps again, with the requests that were kept and those that came meanwhile."""
        self.is_paused = self.holds = False
        held, self.held = self.held, []
        for message in held:
            self._submit(message)
        return {"is_paused": False}

    def forget(self, request_id: str) -> None:
        """Drop a held request, whose client is gone."""
        self.held = [message for message in self.held if message.request_id != request_id]

    def salted(self, cache_salt: str) -> str:
        """The salt of a request's cached prefixes: that of the request, and the number of weight updates so far."""
        return f"{self._num_updates} {cache_salt}" if self._num_updates or cache_salt else ""

    # -- weights -----------------------------------------------------------------------------------------------

    def init_weight_transfer_engine(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        timeout: float = JOIN_SECONDS,
    ) -> dict[str, Any]:
        """Join the process group of a trainer: rank i of this replica is its rank `rank_offset + i`."""
        needed = max(rank_offset, 1) + self._engine.config.parallel.world_size
        if rank_offset < 1 or world_size < needed:
            raise RequestError(
                f"rank_offset is {rank_offset} and world_size {world_size}; this replica needs at least 1 and {needed}"
            )
        arguments = (master_address, master_port, rank_offset, world_size, timeout)
        call_all_ranks(self._engine, weight_transfer.join_trainer, *arguments)
        return {"world_size": world_size}

    def start_weight_update(self) -> dict[str, Any]:
        """Begin an update. Raises `RequestError` unless the engine is paused or idle."""
        self._check_still()
        call_all_ranks(self._engine, weight_transfer.start_update)
        return {}

    def update_weights(self, **update: Any) -> dict[str, Any]:
        """Tensors of the update: `names`, `dtype_names` and `shapes`, which the trainer broadcasts in that order; or
        `path`, a folder with the new weights on a disk that all ranks read, which ends the update."""
        if "path" in update:
            self._check_still()
            call_all_ranks(self._engine, update_weights, os.fspath(update["path"]))
            self._weights_changed()
            return {}
        missing = [name for name in ("names", "dtype_names", "shapes") if not isinstance(update.get(name), list)]
        if missing:
            raise RequestError(f"update_info has no list {missing[0]!r}; give names, dtype_names and shapes, or path")
        if len({len(update[name]) for name in ("names", "dtype_names", "shapes")}) > 1:
            raise RequestError("names, dtype_names and shapes of update_info differ in length")
        tensors = (update["names"], update["dtype_names"], update["shapes"])
        _check_distinct(update["names"])
        call_all_ranks(self._engine, weight_transfer.receive_tensors, *tensors)
        return {}

    def finish_weight_update(self, weight_version: str | None = None) -> dict[str, Any]:
        """Serve the weights that have arrived."""
        self._check_still()
        call_all_ranks(self._engine, weight_transfer.finish_update)
        self._weights_changed()
        if weight_version is not None:
            self.weight_version = weight_version
        return {}

    def update_weight_version(self, new_version: str) -> dict[str, Any]:
        """Name the version of the weights, with which outputs are tagged from now on."""
        self.weight_version = new_version
        return {"new_version": new_version}

    def weight_info(self) -> dict[str, Any]:
        """The version of the weights."""
        return {"weight_version": self.weight_version}

    def _weights_changed(self) -> None:
        self._num_updates += 1
        operations.weights_changed(self._engine)

    # -- sleep -------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> dict[str, Any]:
        """Free the memory of the cache and, with level 2, of the weights. Raises `RequestError` while requests run."""
        operations.fall_asleep(self._engine, level)
        call_all_ranks(self._engine, sleep, level)
        return {"level": self._engine.sleep.level}

    def wake_up(self) -> dict[str, Any]:
        """Allocate what `sleep` has freed; weights come with the next update."""
        if self._engine.sleep.level:
            call_all_ranks(self._engine, wake_up)
            operations.wake_up(self._engine)
        return {"level": 0}

    def is_sleeping(self) -> dict[str, Any]:
        """Whether memory is freed."""
        return {"is_sleeping": self._engine.sleep.level > 0}

    # -- helpers -----------------------------------------------------------------------------------------------

    def _check_still(self) -> None:
        if self._engine.has_unfinished and not self.is_paused:
            raise RequestError("requests are running; pause the engine first (/pause), or wait until it is idle")


def _check_distinct(names: list[str]) -> None:
    """Raises `RequestError` for a name that occurs twice: the ranks and the trainer would not agree on the order."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise RequestError(f"update_info.names has {repeated[0][:200]!r} more than once; name each tensor once")
