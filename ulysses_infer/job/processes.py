"""Starts, supervises and stops the worker processes of an engine in plain Python (without a launcher)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ulysses_infer.child_processes import end_with_parent, path_with_this_package
from ulysses_infer.config import Config
from ulysses_infer.errors import ConfigError, EngineDeadError
from ulysses_infer.worker.memory import relax_gc

if TYPE_CHECKING:
    from ulysses_infer.model.loading.files import TensorSource
    from ulysses_infer.model.loading.sources import GivenModel

STOP_SECONDS = 3.0  # for workers to exit before they are killed
LOSS_SECONDS = 2.0  # a lost connection is noticed before the system reports that the process has ended
READY = b"r"


def is_launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, accelerate) started this process as one of several ranks."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def hand_over(config: Config, model: GivenModel, cleanup: contextlib.ExitStack) -> Config:
    """Write a model in memory to a folder from which the worker processes load it.

    Returns a configuration that names the folder. `cleanup` removes the folder.
    """
    folder = _temporary_folder(cleanup)
    if model.is_copied:  # its state dict is not that of an ordinary model
        own = copy.deepcopy(model.module.config)
        own.dtype = model.module.dtype
        own.save_pretrained(folder)
        _write_weights(model.open(), folder)
    else:
        model.module.save_pretrained(folder)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=folder))


def hand_over_weights(source: Any, cleanup: contextlib.ExitStack) -> str:
    """The folder of the weights of `source`: the path it is, or a temporary folder that they are written to.

    `cleanup` removes a temporary folder.
    """
    if isinstance(source, str | os.PathLike):
        return str(source)
    from ulysses_infer.model.loading.sources import open_weights

    folder = _temporary_folder(cleanup)
    _write_weights(open_weights(source), folder)
    return folder


def _write_weights(weights: TensorSource, folder: str) -> None:
    from safetensors.torch import save_file

    from ulysses_infer.model.loading.files import SINGLE_NAME

    tensors = {name: weights.read(name, None).cpu().clone() for name in weights.keys()}  # noqa: SIM118
    save_file(tensors, Path(folder) / SINGLE_NAME)


def _temporary_folder(cleanup: contextlib.ExitStack) -> str:
    folder = tempfile.mkdtemp(prefix="ulysses_infer_model_")
    cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


class WorkerProcesses:
    """Ranks 1 .. W-1 of an engine whose rank 0 is this process."""

    def __init__(self, config: Config) -> None:
        import torch

        if torch.distributed.is_initialized():
            raise ConfigError(
                "this process already belongs to a process group of another engine or job; shut that down first, "
                "or start all ranks with a launcher"
            )
        self._world_size = config.parallel.world_size
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ready: list[int] = []  # read ends of pipes, one per worker
        try:
            for rank in range(1, self._world_size):
                self._start(config, rank)
        except BaseException:
            self.stop(at_once=True)
            raise

    def meet(self) -> Any:
        """Wait until every worker is ready to join the process group; returns how to join it.

        Raises `EngineDeadError` if a worker ends first.
        """
        from ulysses_infer.parallel.groups import Rendezvous

        while self._ready:
            with open(self._ready.pop(0), "rb") as pipe:
                if pipe.read(1) != READY:
                    raise EngineDeadError(f"the engine cannot start: {self.losses(wait=True)}")
        return Rendezvous(self._store, 0, self._world_size)

    @property
    def are_alive(self) -> bool:
        """Whether all workers still run."""
        return all(process.poll() is None for process in self._processes)

    def losses(self, wait: bool) -> str:
        """Which workers ended and how, in one line; empty if all run. `wait`: a worker is known to be ending."""
        deadline = time.monotonic() + (LOSS_SECONDS if wait else 0)
        while self.are_alive and time.monotonic() < deadline:
            time.sleep(0.01)
        codes = {rank: process.poll() for rank, process in enumerate(self._processes, start=1)}
        return ", ".join(f"worker rank {rank} {_ending(code)}" for rank, code in codes.items() if code is not None)

    def stop(self, at_once: bool = False) -> None:
        """Wait for the workers to exit (unless `at_once`), kill the rest and leave the process group."""
        import torch

        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            try:
                process.wait(0 if at_once else max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for process in self._processes:
            process.wait()
        while self._ready:
            os.close(self._ready.pop())
        if torch.distributed.is_initialized():
            _leave_process_group()

    def _start(self, config: Config, rank: int) -> None:
        """Start a new interpreter instead of a fork or a re-import of the user's script, so it works in notebooks.

        The worker has its own session, so that Ctrl-C interrupts rank 0 only, which then stops the workers.
        """
        read, write = os.pipe()
        self._ready.append(read)
        arguments = [os.getpid(), rank, self._world_size, self._store.port, write]
        process = subprocess.Popen(
            [sys.executable, "-m", "ulysses_infer.job.processes", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path_with_this_package(), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            pass_fds=[write],
            start_new_session=True,
        )
        self._processes.append(process)
        os.close(write)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: `meet` reports it
            process.stdin.write(pickle.dumps(config))
            process.stdin.close()


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _leave_process_group() -> None:
    import deepspeed.comm as comm

    comm.destroy_process_group()


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _worker_main(parent: int, rank: int, world_size: int, port: int, ready: int) -> int:
    """Entry point of a worker process. Reads the configuration from standard input, then follows rank 0's plans."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    relax_gc()
    import torch

    from ulysses_infer.errors import UlyssesError, failure_reason, is_lost_connection
    from ulysses_infer.job.follower import serve_until_shutdown
    from ulysses_infer.job.start_rank import finish_start, start_rank
    from ulysses_infer.parallel.groups import Rendezvous

    def meet() -> Rendezvous:
        with open(ready, "wb") as pipe:
            pipe.write(READY)
        return Rendezvous(torch.distributed.TCPStore("127.0.0.1", port), rank, world_size)

    config = pickle.loads(sys.stdin.buffer.read())
    logging.getLogger("ulysses_infer").setLevel(config.runtime.log_level.upper())
    try:
        started = start_rank(config, rendezvous=meet)
        finish_start(started, config, lambda: None)
        serve_until_shutdown(started)
    except UlyssesError:
        return 2  # rank 0 raises and reports the same error
    except Exception as error:
        if not is_lost_connection(error):  # otherwise the lost rank reports
            print(f"worker rank {rank} failed: {failure_reason(error)}", file=sys.stderr)
        return 1
    return 0


def _exit_at_once(status: int) -> NoReturn:
    """Exit without finalising the interpreter: with torch loaded that takes a second, for which rank 0 would wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _exit_at_once(_worker_main(*map(int, sys.argv[1:])))
