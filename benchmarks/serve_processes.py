"""The processes that benchmarks/serve_report.py measures: a server and an offline engine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ulysses_infer.bench.serve.datasets import Item

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300.0
POLL_SECONDS = 0.5
WORKER = "from benchmarks.serve_processes import offline_worker; offline_worker()"


@dataclass
class Steps:
    """Engine steps in a period of time."""

    count: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0


@dataclass
class Measured:
    """The measurements of one run."""

    tokens: int
    """Generated tokens."""
    seconds: float
    cpu: dict[str, float]
    """CPU seconds by role."""
    steps: Steps
    num_lost: int = 0
    idle_cpu: float = 0.0
    """CPU seconds of the idle engine during the run."""

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """CPU seconds spent in between, by role."""
    return {role: seconds - before.get(role, 0.0) for role, seconds in after.items()}


class ServerProcess:
    """`ulysses-infer serve`, its processes and its counters."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "ulysses_infer.cli.main", "serve", *arguments, "--port", "0"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> str:
        """Wait until the server is ready; returns its URL. Exits with the server's output if it does not start."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r"serving \S.* on (http://\S+)", self._log.read_text(encoding="utf-8"))
            if found:
                return found[1]
            time.sleep(POLL_SECONDS)
        sys.exit(f"the server did not start; its output:\n{self._log.read_text(encoding='utf-8')}")

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds so far, by role."""
        return _cpu_seconds([psutil.Process(self._process.pid)], _server_role)

    def stop(self) -> None:
        """Drain and stop the server."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _server_role(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    if "launch.py" in command and "deepspeed.launcher" not in command:
        return "rank 0" if process.environ().get("RANK", "0") == "0" else "other ranks"
    return "HTTP process" if "ulysses_infer.server.process" in command else "launchers"


def _cpu_seconds(roots: list[psutil.Process], role_of: Callable[[psutil.Process], str]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for root in roots:
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times, role = process.cpu_times(), role_of(process)
                seconds[role] = seconds.get(role, 0.0) + times.user + times.system
    return seconds


def busy_seconds() -> float:
    """CPU seconds of the whole machine since boot."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


@contextmanager
def server(arguments: list[str]) -> Iterator[tuple[ServerProcess, str]]:
    """A running server and its URL."""
    with tempfile.TemporaryDirectory() as folder:
        process = ServerProcess(arguments, Path(folder) / "server.log")
        try:
            yield process, process.wait_until_ready()
        finally:
            process.stop()


class Offline:
    """An offline engine in a process of its own."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        command = [sys.executable, "-c", WORKER, model, json.dumps(settings)]
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded."""
        self._read()

    def generate(self, items: list[Item]) -> Measured:
        """Complete all the prompts and measure."""
        assert self._process.stdin is not None
        before = self.cpu_seconds()
        work = {"prompts": [item.content for item in items], "output_len": items[0].output_len}
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return Measured(
            answer["tokens"], answer["seconds"], difference(self.cpu_seconds(), before), Steps(*answer["steps"])
        )

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds so far, by role."""
        root = psutil.Process(self._process.pid)
        return _cpu_seconds([root], lambda process: "rank 0" if process == root else "other ranks")

    def stop(self) -> None:
        """Stop it by closing its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit("the offline engine ended")


def offline_worker() -> None:
    """The offline engine's process: reads prompts and writes measurements, one JSON line each. Arguments: model,
    settings."""
    from ulysses_infer import SamplingParams, init_inference

    def totals() -> list[float]:
        modes = engine.stats()["modes"].values()
        return [sum(mode[key] for mode in modes) for key in ("steps", "tokens", "seconds")]

    with init_inference(sys.argv[1], **json.loads(sys.argv[2])) as engine:
        engine.generate([[5] * 8] * 4, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        print("{}", flush=True)
        for line in sys.stdin:
            work, before, started = json.loads(line), totals(), time.perf_counter()
            params = SamplingParams(temperature=0, max_tokens=work["output_len"], ignore_eos=True)
            outputs = engine.generate(work["prompts"], params)
            seconds = time.perf_counter() - started
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            steps = [after - earlier for after, earlier in zip(totals(), before, strict=True)]
            print(json.dumps({"tokens": tokens, "seconds": seconds, "steps": steps}), flush=True)
