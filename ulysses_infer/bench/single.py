"""A single-rank engine in its own process, for comparison with the parallel modes."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from ulysses_infer.bench.workload import Sample, measure
from ulysses_infer.child_processes import end_with_parent, variables_of_another_job
from ulysses_infer.config import Config, ParallelConfig, PolicyConfig
from ulysses_infer.errors import EngineDeadError, UlyssesError
from ulysses_infer.inference import InferenceEngine


class SingleRank:
    """The engine's process: it loads the model once and is idle while other modes are measured."""

    def __init__(self, config: Config, num_threads: int) -> None:
        ours, theirs = socket.socketpair()
        variables = {**variables_of_another_job(), "OMP_NUM_THREADS": str(num_threads)}
        command = [sys.executable, "-m", "ulysses_infer.bench.single", str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(command, env=variables, pass_fds=[theirs.fileno()])
        theirs.close()
        self._connection = Connection(ours.detach())
        self._call(_alone(config, num_threads))

    def run(self, prompts: list[list[int]], output_lens: Sequence[int]) -> Sample:
        """Measure one workload. Raises the engine's errors, or `EngineDeadError` if its process has ended."""
        sample: Sample = self._call((prompts, output_lens))
        return sample

    def __enter__(self) -> SingleRank:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _call(self, task: Any) -> Any:
        try:
            self._connection.send(task)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineDeadError(
                "the single rank's process ended, possibly because there is no memory for a second engine"
            ) from error
        if isinstance(answer, UlyssesError):
            raise answer
        return answer


def _alone(config: Config, num_threads: int) -> Config:
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        policy=PolicyConfig(name="static"),
        runtime=dataclasses.replace(config.runtime, threads_per_rank=num_threads),
    )


def _serve(connection: Connection) -> None:
    """Run tasks until the other side closes."""
    try:
        with InferenceEngine(connection.recv()) as engine:
            connection.send(None)
            while True:
                prompts, output_lens = connection.recv()
                connection.send(measure(engine, prompts, output_lens))
    except UlyssesError as error:
        connection.send(error)
    except EOFError:
        return


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(Connection(int(sys.argv[1])))
