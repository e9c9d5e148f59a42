"""What happens only once: programs are installed, compile and convert. It is done before the clock starts."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.compare_peers.environments import UnavailableError
from benchmarks.compare_peers.measuring import Measured, RunningPrograms, Say
from benchmarks.compare_peers.programs import PROGRAMS, Program, Setting
from ulysses_infer.atomic_files import write_atomically
from ulysses_infer.native import compiler

STARTED = "started.json"
"""In the folder of environments: the first starts that were completed."""


def prepare_programs(
    programs: Iterable[str], setting: Setting, logs: Path, seconds: float, measured: Measured, say: Say
) -> None:
    """Install each program, and start and end those that were never started like this.

    Why one fails is noted in `measured.unavailable`. seconds: the most that one start may take.
    """
    file = setting.environments / STARTED
    started: list[str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for name in dict.fromkeys(programs):
        say(f"preparing {name}")
        trial = Measured()
        try:
            key = _first_start(name, PROGRAMS[name](setting), setting)
            if key not in started:
                with RunningPrograms(setting, logs, seconds, trial, say).started([name]):
                    pass
        except UnavailableError as error:
            trial.unavailable[name] = str(error)
            say(f"{name}: not available: {error}")
        measured.unavailable |= trial.unavailable
        if not trial.unavailable and key not in started:
            started.append(key)
            write_atomically(file, json.dumps(started, indent=1))


def _first_start(name: str, program: Program, setting: Setting) -> str:
    """What decides whether a program has to compile or convert anything when it starts."""
    command = program.command[0]
    environment = str(os.lstat(command).st_mtime_ns)  # a new one has none of the files that were made in the old
    ours = _kernels() if Path(command).parent == Path(sys.executable).parent else ""
    return " ".join([name, str(setting.model), setting.dtype, setting.level, str(setting.threads), environment, ours])


def _kernels() -> str:
    """Changes when a C file does."""
    files = sorted(path for path in compiler.FOLDER.rglob("*") if path.suffix in (".c", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
