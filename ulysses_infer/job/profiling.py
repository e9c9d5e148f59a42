"""Traces of torch's profiler, one file per rank, started and stopped between steps."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.worker.rank import Rank

SETTING = "runtime.profile_folder"


def new_trace(engine: Engine) -> tuple[str, str]:
    """On rank 0: the folder of a new trace and the end of its files' names. Raises `RequestError`."""
    folder = engine.config.runtime.profile_folder
    if folder is None:
        raise RequestError(f"{SETTING} is not set; start with {SETTING}=FOLDER to record traces")
    if engine.worker.profiler.is_running:
        raise RequestError("a trace is being recorded already; call stop_profile first")
    return folder, f"{time.time_ns()}.pt.trace.json.gz"


def check_profile(engine: Engine) -> None:
    """On rank 0: raises `RequestError` unless a trace is being recorded."""
    if not engine.worker.profiler.is_running:
        raise RequestError("no trace is being recorded; call start_profile first")


def start_profile(rank: Rank, folder: str, ending: str) -> None:
    """Record a trace, to `folder`/rank_R.`ending`. Collective; an error on any rank is raised on all.

    Raises `ConfigError` if a rank cannot write to the folder.
    """
    number = os.environ.get("RANK", str(rank.groups.rank))  # that of the job, which may have several replicas
    rank.channel.together(lambda: _check_folder(Path(folder)))
    rank.worker.profiler.start(Path(folder) / f"rank_{number}.{ending}", rank.worker.device)


def stop_profile(rank: Rank) -> None:
    """Write the trace. Collective; an error on any rank is raised on all."""
    rank.channel.together(rank.worker.profiler.stop)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ConfigError(f"{SETTING} = {folder}: {error.strerror or error}; name a folder that can be made") from None
    if not writable:
        raise ConfigError(f"{SETTING} = {folder}: cannot be written to; name another folder")
