"""The loop of every rank except rank 0: receive messages and run step plans."""

from __future__ import annotations

import pickle
from typing import Any

from ulysses_infer.errors import EngineDeadError, UlyssesError, fatal
from ulysses_infer.worker.channel import CALL, DRAFT, ERROR, SHUTDOWN, STEP, VALUE
from ulysses_infer.worker.rank import Rank
from ulysses_infer.worker.step_plan import StepPlan


def follow(rank: Rank) -> Any:
    """Run steps until rank 0 shares a value (returned) or an error (raised).

    Raises `EngineDeadError` when a step fails, a rank is lost or rank 0 has shut the engine down.
    """
    with fatal("a step"):
        kind, payload = _run_until_other_message(rank)
    if kind == SHUTDOWN:
        raise EngineDeadError("the engine was shut down")
    result = pickle.loads(payload)
    if kind == ERROR:
        raise result
    return result


def serve_until_shutdown(rank: Rank) -> None:
    """Run steps until rank 0 shuts the engine down; other messages are ignored."""
    while _run_until_other_message(rank)[0] != SHUTDOWN:
        pass


def _run_until_other_message(rank: Rank) -> tuple[int, bytes]:
    """Run steps and calls; returns the first message that is neither."""
    while True:
        kind, payload = rank.channel.receive()
        if kind == STEP:
            rank.worker.run(StepPlan.decode(payload))
        elif kind == DRAFT:
            assert rank.worker.drafter is not None
            rank.worker.drafter.run(payload)
        elif kind == CALL:
            _call(rank, payload)
        elif kind in (VALUE, ERROR, SHUTDOWN):
            return kind, payload


def _call(rank: Rank, payload: bytes) -> None:
    """Run what rank 0 runs on itself at the same time. An error that all ranks get is raised on rank 0 only."""
    action, args = pickle.loads(payload)
    try:
        action(rank, *args)
    except EngineDeadError:
        raise
    except UlyssesError:
        return
