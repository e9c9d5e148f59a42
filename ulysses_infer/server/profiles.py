"""Commands that record traces of torch's profiler, run by rank 0 between steps."""

from __future__ import annotations

from typing import Any

from ulysses_infer.engine.engine import Engine
from ulysses_infer.job.profiling import check_profile, new_trace, start_profile, stop_profile
from ulysses_infer.server.calls import call_all_ranks


class ProfileCommands:
    """Starts and stops the traces of all ranks of a replica."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start_profile(self) -> dict[str, Any]:
        """Record a trace on every rank. Raises `RequestError`."""
        call_all_ranks(self._engine, start_profile, *new_trace(self._engine))
        return {}

    def stop_profile(self) -> dict[str, Any]:
        """Write the traces. Raises `RequestError`."""
        check_profile(self._engine)
        call_all_ranks(self._engine, stop_profile)
        return {}
