"""The loop of every rank except rank 0: receive messages and run step plans."""

from __future__ import annotations

import pickle
from typing import Any

from ulysses_infer.errors import EngineDeadError, UlyssesError, fatal
from ulysses_infer.worker.channel import CALL, ERROR, SHUTDOWN, STEP, VALUE
from ulysses_infer.worker.rank import Rank
from ulysses_infer.worker.step_plan import StepPlan


def follow(rank: Rank) -> Any:
    """Run steps until rank 0 shares a value (returned) or an error (raised).

    Raises `EngineDeadError` when a step fails, a rank is lost or rank 0 has shut the engine down.
    """
    while True:
        with fatal("a step"):
            kind, payload = rank.channel.receive()
            if kind == STEP:
                rank.worker.run(StepPlan.decode(payload))
            if kind == CALL:
                _call(rank, payload)
        if kind == VALUE:
            return pickle.loads(payload)
        if kind == ERROR:
            raise pickle.loads(payload)
        if kind == SHUTDOWN:
            raise EngineDeadError("the engine was shut down")


def serve_until_shutdown(rank: Rank) -> None:
    """A worker process of an engine that lives in another process: follow until it shuts down."""
    while True:
        kind, payload = rank.channel.receive()
        if kind == SHUTDOWN:
            return
        if kind == STEP:
            rank.worker.run(StepPlan.decode(payload))
        if kind == CALL:
            _call(rank, payload)


def _call(rank: Rank, payload: bytes) -> None:
    """Run what rank 0 runs at the same time on itself. What is refused is refused on all ranks, and raised there."""
    action, args = pickle.loads(payload)
    try:
        action(rank, *args)
    except EngineDeadError:
        raise
    except UlyssesError:
        return
