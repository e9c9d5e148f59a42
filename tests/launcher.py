"""Start commands as a user does, and see what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from ulysses_infer.job.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = "ulysses_infer/launch.py"
DEMO = ["generate", "--config", "recipes/demo.yaml"]
WAIT_SECONDS = 120.0


def environment() -> dict[str, str]:
    """Variables for ranks on the CPU. The package is not on the path: `launch.py` has to find it."""
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    return variables


def deepspeed(num_ranks: int, *arguments: str) -> list[str]:
    """The `deepspeed` command on `num_ranks` ranks, with a free port."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    return [*launcher, "--num_gpus", str(num_ranks), LAUNCH, *arguments]


def ulysses_infer(*arguments: str) -> list[str]:
    """The `ulysses-infer` command."""
    return [sys.executable, "-m", "ulysses_infer.cli.main", *arguments]


def run(command: list[str], timeout: float = WAIT_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository to its end."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


class Running:
    """A command that runs, with all the processes it started; ends them all when left."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.started: list[psutil.Process] = []

    def wait_for_output(self, words: str) -> None:
        """Read the output up to a line with `words`, and note the processes there are then."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if words in line:
                self.started = psutil.Process(self.process.pid).children(recursive=True)
                return
        raise AssertionError(f"{words!r} never came; the output was:\n{''.join(seen)}")

    def rest_of_output(self) -> str:
        """Everything up to the end of the output, which comes when all processes that write to it have ended."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def left_after(self, seconds: float) -> list[psutil.Process]:
        """Which of the processes it started are still there."""
        return psutil.wait_procs(self.started, timeout=seconds)[1]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in [*self.started, *_descendants(self.process)]:
            if process.is_running():
                process.kill()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
