"""Starts and ends the servers under comparison."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ulysses_infer.bench.compare.contenders import GROUP, REPLICAS
from ulysses_infer.bench.serve.client import Client, Server
from ulysses_infer.child_processes import send
from ulysses_infer.config import Config
from ulysses_infer.errors import ConfigError
from ulysses_infer.job.processes import free_port

START_SECONDS = 900.0
POLL_SECONDS = 0.2
END_SECONDS = 60.0
KEY_VARIABLE = "ULYSSES_COMPARE_KEY"
SHARE_OF_MEMORY = 0.45  # if two servers run at the same time


def server_overrides(name: str, config: Config, num_ranks: int, is_adaptive: bool, is_alone: bool) -> dict[str, str]:
    """Recipe keys for a server of the comparison, named as in `Contender.server`.

    The group keeps the recipe's own layout if it has the right number of ranks. With `is_adaptive` the server starts
    with the adaptive policy, so that it measures step times if necessary.
    """
    parallel = config.parallel
    is_recipe = name != REPLICAS and parallel.world_size == num_ranks
    keys = {
        "parallel.dp": str(num_ranks if name == REPLICAS else 1),
        "parallel.sp": str(parallel.sp if is_recipe else 1 if name == REPLICAS else num_ranks),
        "parallel.tp": str(parallel.tp if is_recipe else 1),
        "server.host": "127.0.0.1",
        "server.api_key": "null",
        "server.admin_api_key": f"${{oc.env:{KEY_VARIABLE}}}",
        "server.dashboard": "true",
        "speculation.method": "none" if name in (REPLICAS, GROUP) else name,
    }
    if not is_recipe:
        keys["parallel.modes"] = "null"
    if name == REPLICAS:
        keys |= {"policy.name": "static", "policy.mode": "sp"}
    elif is_adaptive or name != GROUP:
        keys["policy.name"] = "adaptive"
    if not is_alone and config.cache.num_blocks is None and config.cache.memory_bytes is None:
        keys["cache.memory_utilization"] = f"{config.cache.memory_utilization * SHARE_OF_MEMORY:.3g}"
    return keys


class Servers:
    """Starts servers on demand, with `in_turn` only one at a time, and ends them on exit."""

    def __init__(self, commands: Mapping[str, Sequence[str]], folder: Path, in_turn: bool) -> None:
        self._commands, self._folder, self._in_turn = commands, folder, in_turn
        self._running: dict[str, RunningServer] = {}

    def get(self, name: str) -> RunningServer:
        """A running server. Raises `ConfigError` if it does not start."""
        if name not in self._running:
            if self._in_turn:
                self.stop()
            self._running[name] = server = RunningServer(name, self._commands[name], self._folder / f"{name}.log")
            server.wait_until_ready()
        return self._running[name]

    def stop(self) -> None:
        """End all servers."""
        for server in self._running.values():
            server.terminate()
        while self._running:
            self._running.popitem()[1].stop()

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class RunningServer:
    """One `serve` command and a client of it."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self._log, port, key = name, log, free_port(), secrets.token_hex(16)
        self.client = Client(Server.of(f"http://127.0.0.1:{port}", key))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, f"server.port={port}"],
                env={**os.environ, KEY_VARIABLE: key},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> None:
        """Wait until the server is ready. Raises `ConfigError` with its last output if it does not start."""
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None:
                raise ConfigError(f"the server for {self.name} did not start: {self._last_output()}")
            if time.monotonic() > deadline:
                raise ConfigError(f"the server for {self.name} was not ready in {START_SECONDS:g} s; see {self._log}")
            time.sleep(POLL_SECONDS)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.client.close()
        if self._process.poll() is None:
            send(self._process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """End it, or kill it after a time."""
        self.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.client.server.url}/ready", timeout=POLL_SECONDS * 10):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):  # not listening yet, or status 503
            return False

    def _last_output(self) -> str:
        log = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["it printed nothing"])[-1]


def serve_command(launch: Sequence[str] | None, num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command line of a server with `num_ranks` ranks."""
    if launch is None:
        return [sys.executable, "-m", "ulysses_infer.cli.main", "serve", *arguments]
    return [*launch, str(num_ranks), "serve", *arguments]
