"""Commands killed with SIGKILL: ten seconds later none of their processes is left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.caches import empty_cache
from tests.job.test_child_processes import MARK, assert_gone, marked

pytestmark = pytest.mark.launcher
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
SERVER = "ulysses_infer.server.process"
RANK = "--local_rank="
SETTINGS = ["cache.num_blocks=128", "cache.block_size=4", "runtime.device=cpu", "runtime.threads_per_rank=1"]
COMMANDS = {
    "compare": (["bench", "compare", "--scale", "smoke", "--repeats", "1"], SERVER),
    "serve": (["serve", "parallel.sp=2", "--port", "0"], SERVER),
    "replicas": (["serve", "parallel.dp=2", "--port", "0"], SERVER),
    "calibrate": (["calibrate", "parallel.sp=2"], RANK),
    "generate": (["generate", "parallel.sp=2", "--prompt", "hello", "--max-tokens", "100"], RANK),
}
"""The arguments of each, and a part of the command line of the last process that it starts."""
TEST = """
import subprocess, sys, time

def test_that_never_ends():
    subprocess.Popen({command}, start_new_session=True)
    time.sleep(1000)
"""


def start(command, mark, last, cache):
    """The command, once it has started a process with `last` in its command line."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": empty_cache(cache),
    }
    output = subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables, MARK: mark}, stdout=output, stderr=output
    )
    deadline = time.monotonic() + START_SECONDS
    while not any(last in line for line in command_lines(mark)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def command_lines(mark):
    """The command lines of the processes with `mark`, without those of the launchers, which name the ranks' program."""
    lines = []
    for process in marked(mark):
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return [line for line in lines if "deepspeed.launcher" not in line]


def arguments_of(name, folder, tmp_path):
    first, *rest = COMMANDS[name][0]
    model = [*([rest.pop(0)] if first == "bench" else []), folder]
    output = ["--output", str(tmp_path / "report")] if first == "bench" else []
    return [first, *model, *rest, *output, *SETTINGS]


@pytest.mark.parametrize(
    ("name", "stopped"),
    [
        ("serve", False),
        *(pytest.param(name, False, marks=pytest.mark.thorough) for name in COMMANDS if name != "serve"),
        *(pytest.param(name, True, marks=pytest.mark.thorough) for name in ("serve", "compare")),
    ],
)
def test_nothing_outlives_a_killed_command(folder, tmp_path, name, stopped):
    command = [sys.executable, "-m", "ulysses_infer.cli.main", *arguments_of(name, folder, tmp_path)]
    process = start(command, str(tmp_path), COMMANDS[name][1], tmp_path)
    if stopped:
        for each in marked(str(tmp_path)):
            if "child_processes.py" not in " ".join(each.cmdline()):
                each.suspend()
    process.kill()
    process.wait()
    assert_gone(str(tmp_path))


@pytest.mark.parametrize("program", ["sleep", pytest.param("serve", marks=pytest.mark.thorough)])
def test_nothing_outlives_a_killed_test_session(folder, tmp_path, program):
    serve = [sys.executable, "-m", "ulysses_infer.cli.main", *arguments_of("serve", folder, tmp_path)]
    command, last = (["sleep", "1000"], "sleep 1000") if program == "sleep" else (serve, SERVER)
    (tmp_path / "test_inner.py").write_text(TEST.format(command=command))
    options = [
        "-p",
        "tests.conftest",
        "-c",
        "pyproject.toml",
        "-p",
        "no:cacheprovider",
        str(tmp_path / "test_inner.py"),
    ]
    process = start([sys.executable, "-m", "pytest", *options], str(tmp_path), last, tmp_path)
    process.kill()
    process.wait()
    assert_gone(str(tmp_path))
