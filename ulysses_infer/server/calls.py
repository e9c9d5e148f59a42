"""A call that rank 0 makes between steps, and that every rank of the replica runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import EngineDeadError, RequestError, UlyssesError
from ulysses_infer.worker.channel import CALL


def call_all_ranks(engine: Engine, action: Callable[..., None], *arguments: Any) -> None:
    """Run `action(rank, …)` on every rank. A refused command is a `RequestError`."""
    rank = engine.rank
    rank.channel.send(CALL, pickle.dumps((action, arguments)))
    try:
        action(rank, *arguments)
    except (RequestError, EngineDeadError):
        raise
    except UlyssesError as error:  # a checkpoint or a configuration that does not fit: nothing has changed
        raise RequestError(str(error)) from error
