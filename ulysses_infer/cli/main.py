"""The `ulysses-infer` program: checks a command, starts the `deepspeed` launcher, forwards signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ulysses_infer.child_processes import die_with_parent, end_children_with_this_process, send
from ulysses_infer.cli.arguments import CLIENTS, Command, parse
from ulysses_infer.config import Config
from ulysses_infer.errors import ConfigError, UlyssesError
from ulysses_infer.host import cpu_quota, shared_cores
from ulysses_infer.job.processes import free_port, is_launched

LAUNCH = Path(__file__).parents[1] / "launch.py"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 5.0
LEAVE_SECONDS = 15.0  # for a drained server to close its connections, and for the launcher to notice its end
POLL_SECONDS = 1.0


def main() -> None:
    """Entry point of the console script; exits with the status of the ranks."""
    arguments = sys.argv[1:]
    try:
        command = parse(arguments)
        if command.name in CLIENTS:
            sys.exit(_run_client(command))
        with _quiet_config():
            config = command.config()
        if command.is_dry:
            sys.exit(_run_dry(command, config))
        if command.is_on_ray:
            sys.exit(_run_on_ray(config))
        is_server = command.name == "serve"
        if num_ranks(config, is_server) > 1 and not is_launched():
            sys.exit(launch(arguments, config, is_server))
    except UlyssesError as error:
        sys.exit(_report(error))
    from ulysses_infer.cli.rank import main as run_here

    run_here(arguments)


@contextlib.contextmanager
def _quiet_config() -> Iterator[None]:
    """Leave warnings about the configuration to rank 0, which reads it again."""
    logger = logging.getLogger("ulysses_infer.config")
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)


def _run_client(command: Command) -> int:
    """Run a command that needs no ranks; returns the exit status."""
    if command.name == "bench serve":
        from ulysses_infer.bench.serve.serve_bench import run as load_server

        return load_server(command.options)
    if command.name == "bench replay":
        from ulysses_infer.bench.replay.replay_bench import run as replay

        return replay(command.options)
    if command.name == "plan":
        from ulysses_infer.planning.command import run as plan

        return plan(command.options)
    from ulysses_infer.bench.compare.compare_bench import run as compare

    end_children_with_this_process()
    return compare(command.options, command.overrides)


def _run_dry(command: Command, config: Config) -> int:
    """Print what a start would do, in this process; returns the exit status."""
    from ulysses_infer.console.library_logging import quiet_libraries

    quiet_libraries(0)
    from ulysses_infer.cli.dry_run.command import run as run_dry

    run_dry(command.options, config)
    return 0


def _run_on_ray(config: Config) -> int:
    from ulysses_infer.ray.command import run as serve_on_ray

    return serve_on_ray(config)


def launch(arguments: list[str], config: Config, is_server: bool = False) -> int:
    """Run the command on its ranks under DeepSpeed's launcher; returns the exit status.

    The launcher does not forward signals. So it gets its own process group, and a signal to this process ends that
    group. If this process is killed, the kernel ends the launcher, which the ranks notice; a keeper ends the rest.
    """
    end_children_with_this_process()
    process = subprocess.Popen(
        launcher_command(arguments, num_ranks(config, is_server)),
        env={**os.environ, **launcher_variables(config, num_ranks(config, is_server))},
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    stop = Stop(process, config.server.shutdown_timeout if is_server else None)
    for number in SIGNALS:
        signal.signal(number, stop.take)
    return stop.wait()


def num_ranks(config: Config, is_server: bool) -> int:
    """The number of ranks of a command; only a server has replicas."""
    return config.parallel.num_ranks if is_server else config.parallel.world_size


class Stop:
    """Ends the launcher and its ranks after a signal, and waits for them.

    To drain a server, only rank 0 gets the signal, and it stops the other ranks when every request is answered; the
    launcher would wait 30 seconds per rank. drain_seconds: the longest that takes; None for other commands.
    """

    def __init__(self, process: subprocess.Popen[bytes], drain_seconds: float | None) -> None:
        self._process, self._drain_seconds = process, drain_seconds
        self._received: list[int] = []
        self._deadline: float | None = None
        self._is_drained = False

    def take(self, number: int, frame: object) -> None:
        """Handle a signal: the first one ends the job in order, a second one immediately."""
        self._received.append(number)
        rank_zero = _rank_zero(self._process) if self._drain_seconds is not None else None
        if rank_zero is not None and len(self._received) <= 2:
            self._is_drained = len(self._received) == 1
            patience = (self._drain_seconds or 0.0) if self._is_drained else 0.0
            self._deadline = time.monotonic() + STOP_SECONDS + patience + LEAVE_SECONDS
            send(rank_zero.pid, signal.SIGTERM)
        else:
            self._is_drained = False
            self._deadline = time.monotonic() + STOP_SECONDS
            number = signal.SIGTERM if len(self._received) == 1 else signal.SIGKILL
            send(self._process.pid, number, group=True)

    def wait(self) -> int:
        """The exit status of the ranks; 128 + n if signal n ended them early."""
        while self._deadline is None or time.monotonic() < self._deadline:
            try:
                return self._status(self._process.wait(timeout=POLL_SECONDS))
            except subprocess.TimeoutExpired:
                continue
        send(self._process.pid, signal.SIGKILL, group=True)
        self._is_drained = False
        return self._status(self._process.wait())

    def _status(self, status: int) -> int:
        if self._received and not self._is_drained:
            return 128 + self._received[-1]
        return status if status >= 0 else 128 - status


def launcher_command(arguments: list[str], count: int) -> list[str]:
    """DeepSpeed's launcher without its own output: the ranks report their errors themselves."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--log_level",
        "critical",
        "--master_port",
        str(free_port()),
        "--num_gpus",
        str(count),
        str(LAUNCH),
        *arguments,
    ]


def launcher_variables(config: Config, count: int) -> dict[str, str]:
    """Environment variables for `count` ranks; on a CPU each gets its share of the cores."""
    if _uses_gpus(config, count):
        return {}
    variables = {"DS_ACCELERATOR": "cpu"}
    own = frozenset(os.sched_getaffinity(0))
    shared = shared_cores(own, [own], count, cpu_quota())
    threads = config.runtime.threads_per_rank or shared.threads_per_rank
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(threads)
    if shared.crowding(threads) and "OMP_WAIT_POLICY" not in os.environ:
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
    return variables


def _uses_gpus(config: Config, count: int) -> bool:
    """Whether the ranks run on GPUs. Raises `ConfigError` if there are some but too few."""
    if config.runtime.device == "cpu":
        return False
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus == 0 and config.runtime.device == "auto":
        return False
    if num_gpus < count:
        raise ConfigError(
            f"{count} ranks need {count} GPUs, but this machine has {num_gpus}; lower parallel.sp or "
            "parallel.tp, or set runtime.device=cpu"
        )
    return True


def _rank_zero(launcher: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The process of rank 0, once the launcher has started it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if str(LAUNCH) in process.cmdline() and process.environ().get("RANK") == "0":
                    return process
    return None


def _report(error: UlyssesError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
