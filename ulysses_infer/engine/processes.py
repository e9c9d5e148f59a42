"""Worker processes of an engine in plain Python (a script or a notebook): started, watched and ended by it."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from ulysses_infer.config import Config
from ulysses_infer.errors import ConfigError

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STOP_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def is_launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, accelerate) started this process as one of several ranks."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def hand_over(config: Config, model: Any) -> tuple[Config, Any]:
    """A model in memory has to reach the worker processes: it is written to a folder that they all load from."""
    if model is None:
        return config, None
    folder = tempfile.mkdtemp(prefix="ulysses_infer_model_")
    model.save_pretrained(folder)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=folder)), None


class WorkerProcesses:
    """Ranks 1 .. W-1 of an engine whose rank 0 is this process."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], saved: dict[str, str | None]) -> None:
        self._processes, self._saved = processes, saved
        self._stopping = threading.Event()

    @classmethod
    def start(cls, config: Config) -> WorkerProcesses:
        """Start the workers and make this process rank 0 of their group (by the usual environment variables)."""
        import torch

        if torch.distributed.is_initialized():
            raise ConfigError(
                "this process already belongs to a process group of another engine or job; shut that down first, "
                "or start all ranks with a launcher"
            )
        world_size = config.parallel.world_size
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        processes = [_start_worker(config, rank, environment) for rank in range(1, world_size)]
        saved = {name: os.environ.get(name) for name in RENDEZVOUS}
        os.environ.update({**environment, "RANK": "0", "LOCAL_RANK": "0"})
        workers = cls(processes, saved)
        threading.Thread(target=workers._watch, daemon=True).start()
        return workers

    def started(self) -> None:
        """The ranks have met: the environment goes back to what it was."""
        _restore(self._saved)

    @property
    def are_alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def stop(self, at_once: bool = False) -> None:
        """End the workers (asking first unless `at_once`) and leave the process group."""
        import torch

        self._stopping.set()
        deadline = time.monotonic() + (0 if at_once else STOP_SECONDS)
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _restore(self._saved)
        if torch.distributed.is_initialized():
            _leave_group()

    def _watch(self) -> None:
        """A worker that dies before the group has formed would leave rank 0 waiting for it: end the wait."""
        while not self._stopping.wait(0.5):
            if not self.are_alive and not self._stopping.is_set():
                self._stopping.set()
                for process in self._processes:
                    process.kill()
                return


def _leave_group() -> None:
    import deepspeed.comm as comm

    comm.destroy_process_group()


def _restore(saved: dict[str, str | None]) -> None:
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _start_worker(config: Config, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A fresh interpreter, not a fork or a re-import of the user's script: works from a notebook cell.

    It gets a session of its own, so that Ctrl-C reaches rank 0 alone, which then ends the workers.
    """
    variables = {**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    root = str(Path(__file__).resolve().parents[2])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "ulysses_infer.engine.processes", str(os.getpid())],
        env=variables, stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(config))
    process.stdin.close()
    return process


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request was made
        os._exit(1)


def _worker_main() -> int:
    """One worker process: the configuration comes on standard input, everything else from rank 0's plans."""
    end_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from ulysses_infer.engine.follower import serve_until_shutdown
    from ulysses_infer.engine.setup import start_rank
    from ulysses_infer.errors import UlyssesError

    config = pickle.loads(sys.stdin.buffer.read())
    try:
        rank = start_rank(config)
        rank.channel.agree(None)
        rank.channel.gather(rank.worker.model.weight_bytes)
        serve_until_shutdown(rank)
    except UlyssesError:
        return 2  # rank 0 raises the same error; one report is enough
    return 0


if __name__ == "__main__":
    sys.exit(_worker_main())
