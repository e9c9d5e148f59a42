"""Traces of torch's profiler, one file per rank, started and stopped between steps."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.worker.rank import Rank
from ulysses_infer.worker.step_plan import StepPlan

SETTING = "runtime.profile_folder"


class Profiler:
    """Records what this thread runs, and a GPU's kernels, from now on. Implements `StepProfiler`."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """path: the file of the trace."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._running, self._path = profile(activities=activities), path
        self._running.start()

    def stop(self) -> None:
        """Write the trace. Raises OSError."""
        self._running.stop()
        self._running.export_chrome_trace(str(self._path))

    def annotated(self, plan: StepPlan) -> AbstractContextManager[Any]:
        """The step as an event of the trace: native kernels and replayed graphs have no events of their own."""
        return record_function(
            f"step {plan.sequence}: {plan.mode}, {plan.num_tokens} tokens of {len(plan.items)} requests"
        )


def new_trace(engine: Engine) -> tuple[str, str]:
    """On rank 0: the folder of a new trace and the end of its files' names. Raises `RequestError`."""
    folder = engine.config.runtime.profile_folder
    if folder is None:
        raise RequestError(f"{SETTING} is not set; start with {SETTING}=FOLDER to record traces")
    if engine.worker.profiler is not None:
        raise RequestError("a trace is being recorded already; call stop_profile first")
    return folder, f"{time.time_ns()}.pt.trace.json.gz"


def check_profile(engine: Engine) -> None:
    """On rank 0: raises `RequestError` unless a trace is being recorded."""
    if engine.worker.profiler is None:
        raise RequestError("no trace is being recorded; call start_profile first")


def start_profile(rank: Rank, folder: str, ending: str) -> None:
    """Record a trace, to `folder`/rank_R.`ending`. Collective; an error on any rank is raised on all.

    Raises `ConfigError` if a rank cannot write to the folder.
    """
    number = os.environ.get("RANK", str(rank.groups.rank))  # that of the job, which may have several replicas
    rank.channel.together(lambda: _check_folder(Path(folder)))
    rank.worker.profiler = Profiler(Path(folder) / f"rank_{number}.{ending}", rank.worker.device)


def stop_profile(rank: Rank) -> None:
    """Write the trace. Collective; an error on any rank is raised on all."""
    profiler, rank.worker.profiler = rank.worker.profiler, None
    assert isinstance(profiler, Profiler)
    with rank.silent():  # torch keeps Python's global lock, for 30 us per event: heartbeats wait
        rank.channel.together(profiler.stop)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ConfigError(f"{SETTING} = {folder}: {error.strerror or error}; name a folder that can be made") from None
    if not writable:
        raise ConfigError(f"{SETTING} = {folder}: cannot be written to; name another folder")
