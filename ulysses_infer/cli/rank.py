"""One rank of a command, from its arguments to its exit status."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
from typing import NoReturn

from ulysses_infer.cli.arguments import Command, parse
from ulysses_infer.config import Config
from ulysses_infer.console.library_logging import quiet_libraries, set_up_logging
from ulysses_infer.console.screen import restore_cursor
from ulysses_infer.errors import ConfigError, EngineDeadError, UlyssesError, is_lost_connection
from ulysses_infer.job.lifetime import Guard
from ulysses_infer.worker.memory import relax_gc

USER_ERROR, BUG = 2, 1
PATIENCE_SECONDS = 10.0
BUG_PATIENCE_SECONDS = 2.0

RUNNERS = {"generate": "ulysses_infer.cli.generate", "calibrate": "ulysses_infer.cli.calibrate"}


def main(arguments: list[str]) -> NoReturn:
    """Run the command on this rank and exit: 0; 2 for a user's error; 1 for a bug; 128 + n after signal n.

    All ranks exit by themselves. An error is one line, on rank 0.
    """
    rank = int(os.environ.get("RANK", "0"))
    relax_gc()
    quiet_libraries(rank)
    guard = Guard(restore_cursor if rank == 0 else _nothing)
    status = 0
    try:
        run(parse(_without_local_rank(arguments)), rank, guard)
    except SystemExit as request:  # --help
        status = request.code if isinstance(request.code, int) else 0
    except UlyssesError as error:
        guard.start()
        if isinstance(error, EngineDeadError):
            guard.give_way()
        report(error, rank)
        status = USER_ERROR
    except Exception as error:
        guard.start()
        if is_lost_connection(error):
            guard.give_way()
        report_bug(error, rank)
        status = BUG
    leave(status)


def run(command: Command, rank: int, guard: Guard) -> None:
    """Check the command against the job and run it."""
    if command.is_dry:
        raise ConfigError("--dry-run is for one process; run it without a launcher: ulysses-infer generate --dry-run")
    config = command.config()
    set_up_logging(config.runtime.log_level, rank)
    check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")), replicas=command.name == "serve")
    if command.name == "serve":
        from ulysses_infer.server.serve import run as serve

        serve(config, rank, guard)
    elif command.name == "bench":
        from ulysses_infer.bench.offline import run as bench

        guard.start()
        bench(command.options, config, rank, guard)
    else:
        guard.start()
        importlib.import_module(RUNNERS[command.name]).run(command.options, config, rank)


def check_world_size(config: Config, world_size: int, replicas: bool = False) -> None:
    """Raise `ConfigError` unless the job has as many ranks as the recipe needs (for all `replicas`, or for one)."""
    parallel = config.parallel
    wanted = parallel.num_ranks if replicas else parallel.world_size
    if wanted != world_size:
        sizes = {"sp": parallel.sp, "tp": parallel.tp} | ({"dp": parallel.dp} if replicas and parallel.dp > 1 else {})
        raise ConfigError(
            f"{' * '.join(f'parallel.{name}' for name in sizes)} = {' * '.join(map(str, sizes.values()))} = {wanted}, "
            f"but the job has {world_size} ranks; start {wanted} ranks (deepspeed --num_gpus {wanted}) or "
            f"change parallel.{'/'.join(sizes)}"
        )


def report(error: UlyssesError, rank: int) -> None:
    """Rank 0 prints the error; the others have the same error and wait for the launcher to end them.

    The launcher ends all ranks as soon as one exits, so a faster rank must not silence rank 0. If another rank's
    failure ended the engine, rank 0 only knows that the rank was lost; then that rank prints its own error.
    """
    logging.getLogger("ulysses_infer").debug("%s", error, exc_info=error)
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif not isinstance(error, EngineDeadError):
        time.sleep(PATIENCE_SECONDS)
    elif error.__cause__ is not None and not is_lost_connection(error.__cause__):
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)


def report_bug(error: Exception, rank: int) -> None:
    """Unexpected errors need a stack trace, from one rank: others print theirs only if rank 0 has none."""
    if rank > 0:
        time.sleep(BUG_PATIENCE_SECONDS)
    if is_lost_connection(error):
        return  # the lost rank, or rank 0, has printed the reason
    print(f"error: rank {rank}: {type(error).__name__}: {error} (please report this)", file=sys.stderr)
    traceback.print_exception(error)


def leave(status: int) -> NoReturn:
    """Exit. After an error immediately, because leaving a process group in order would wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
    sys.exit(status)


def _without_local_rank(arguments: list[str]) -> list[str]:
    """DeepSpeed's launcher inserts `--local_rank=i`; the environment has the same information."""
    return [argument for argument in arguments if not argument.startswith(("--local_rank=", "--local-rank="))]


def _nothing() -> None:
    """Nothing to clean up."""
