"""Rank processes that tests share: started once, they run one function after another, all ranks the same one."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from ulysses_infer.child_processes import end_with_parent
from ulysses_infer.job.processes import free_port

START_SECONDS = 120.0
CASE_SECONDS = 120.0
GRACE_SECONDS = 5.0  # for the other ranks' reports once one has failed
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
PRELOADED = ["tests.preloaded"]


class RankPool:
    """`world_size` processes that look launched (RANK, WORLD_SIZE set) and share one gloo process group.

    `pool.run(function, *args)` calls the function on every rank and returns its results in rank order. Function,
    arguments and results travel by pickle, so the function must be a module-level one. Inside, `deepspeed.comm` is
    ready, `RANK` and `WORLD_SIZE` are in `os.environ`, and `init_inference` runs SPMD; leave no groups or engines
    behind. The first error of any rank is raised here with that rank and its traceback as notes; a case that takes
    longer than `timeout` seconds raises TimeoutError. After either the ranks are replaced by new ones.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = CASE_SECONDS) -> list[Any]:
        """Call `function(*args)` on every rank; see the class."""
        if not self._processes:
            self._start()
        done = False
        try:
            self._send((function, args))
            results = self._collect(timeout, getattr(function, "__name__", str(function)))
            done = True
        finally:
            if not done:
                self.close()
        return results

    def close(self) -> None:
        """End the ranks. The next `run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        rendezvous = {"WORLD_SIZE": str(self.world_size), "LOCAL_WORLD_SIZE": str(self.world_size)}
        rendezvous |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(self.world_size):
            ours, theirs = multiprocessing.Pipe()
            environment = {**ENVIRONMENT, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._processes.append(start_forked(_serve, theirs, environment))
            theirs.close()
            self._connections.append(ours)
        self._send((_join_group, ()))
        self._collect(START_SECONDS, "starting the ranks")

    def _send(self, case: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        payload = pickle.dumps(case)
        for connection in self._connections:
            connection.send((sys.path, payload))

    def _collect(self, timeout: float, name: str) -> list[Any]:
        deadline = time.monotonic() + timeout
        waiting = dict(zip(self._connections, range(self.world_size), strict=True))
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        while waiting:
            ready: list[Any] = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                report = _receive(connection)
                if isinstance(report, BaseException):
                    errors[rank] = report
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                else:
                    (results[rank],) = report
        if errors:
            rank, error = min(errors.items())
            others = f"failed: {sorted(errors)}, silent: {sorted(waiting.values())}"
            error.add_note(f"(rank {rank} of {self.world_size}; {others})")
            raise error
        if waiting:
            raise TimeoutError(f"{name}: no answer from ranks {[*waiting.values()]} after {timeout:.0f} s")
        return [results[rank] for rank in range(self.world_size)]


def start_forked(function: Callable[..., Any], *args: Any) -> Any:
    """The `multiprocessing` process, started, of `function(*args)`: a fork of one that has imported all it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=args, daemon=True)
    with _environment(ENVIRONMENT):  # read while the fork server imports, once for all
        process.start()
    return process


class RankPools:
    """One `RankPool` per world size, made on first use."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        return self._pools.setdefault(world_size, RankPool(world_size))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionError):
        return RuntimeError("the rank's process ended")


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """What a rank does: cases in, results or errors out, until the test session ends."""
    end_with_parent(os.getppid())
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    while True:
        path, payload = connection.recv()
        sys.path[:] = path
        connection.send(_run_case(payload))


def _run_case(payload: bytes) -> tuple[Any] | BaseException:
    try:
        function, args = pickle.loads(payload)
        result = (function(*args),)
        pickle.dumps(result)
    except Exception as error:
        return _portable(error)
    return result


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or a stand-in for one that pickle cannot carry."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = error.__cause__ = None
    error.add_note(text)
    return error


def _join_group() -> None:
    from datetime import timedelta

    import torch

    from ulysses_infer.parallel.groups import init_distributed

    if int(os.environ["WORLD_SIZE"]) > 1:
        init_distributed(torch.device("cpu"), timedelta(seconds=CASE_SECONDS))


@contextmanager
def _environment(values: dict[str, str]) -> Any:
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
