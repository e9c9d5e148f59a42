"""`ulysses-infer`: check a command, start the `deepspeed` launcher with the ranks it needs, pass signals on."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from ulysses_infer.config import Config
from ulysses_infer.engine.processes import free_port, is_launched
from ulysses_infer.errors import ConfigError, UlyssesError
from ulysses_infer.frontend.arguments import parse

LAUNCH = Path(__file__).with_name("launch.py")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Entry point of the console script; exits with the status of the ranks."""
    arguments = sys.argv[1:]
    try:
        config = parse(arguments).config()
        if config.parallel.world_size > 1 and not is_launched():
            sys.exit(launch(arguments, config))
    except UlyssesError as error:
        sys.exit(_report(error))
    from ulysses_infer.frontend.rank import main as run_here

    run_here(arguments)


def launch(arguments: list[str], config: Config) -> int:
    """Run the command on `sp * tp` ranks under DeepSpeed's launcher; returns the exit status.

    The launcher passes no signal on, so it gets a process group of its own, and a signal to this process ends all of
    that group; should this process be killed, the kernel ends the launcher, which the ranks notice.
    """
    process = subprocess.Popen(
        launcher_command(arguments, config.parallel.world_size),
        env={**os.environ, **launcher_variables(config)},
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        _signal_group(process, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    for number in SIGNALS:
        signal.signal(number, forward)
    status = _wait(process, received)
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def launcher_command(arguments: list[str], num_ranks: int) -> list[str]:
    """DeepSpeed's launcher, which says nothing of its own: the ranks report their errors themselves."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--master_port", str(free_port()),
        "--num_gpus", str(num_ranks), str(LAUNCH), *arguments,
    ]  # fmt: skip


def launcher_variables(config: Config) -> dict[str, str]:
    """Environment variables that the ranks need; on a CPU each gets its share of the cores."""
    num_ranks = config.parallel.world_size
    if _uses_gpus(config):
        return {}
    variables = {"DS_ACCELERATOR": "cpu"}
    if "OMP_NUM_THREADS" not in os.environ:
        share = max(1, len(os.sched_getaffinity(0)) // num_ranks)
        variables["OMP_NUM_THREADS"] = str(config.runtime.threads_per_rank or share)
    return variables


def _uses_gpus(config: Config) -> bool:
    """Whether the ranks compute on GPUs. Raises `ConfigError` if there are some, but too few."""
    if config.runtime.device == "cpu":
        return False
    import torch

    num_gpus, num_ranks = torch.cuda.device_count(), config.parallel.world_size
    if num_gpus == 0 and config.runtime.device == "auto":
        return False
    if num_gpus < num_ranks:
        raise ConfigError(
            f"{num_ranks} ranks need {num_ranks} GPUs, but this machine has {num_gpus}; lower parallel.sp or "
            "parallel.tp, or set runtime.device=cpu"
        )
    return True


def _die_with_parent() -> None:
    """In the launcher, before it starts: have the kernel end it when this process ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], received: list[int]) -> int:
    """Wait for the launcher; once a signal was passed on, no longer than `STOP_SECONDS`."""
    while not received:
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            continue
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        return process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # all have ended


def _report(error: UlyssesError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
