"""Nothing that a program starts outlives it: stopped processes, orphans and foreign programs included."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ulysses_infer.child_processes import GRACE_SECONDS, VARIABLE

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0
MARK = "ULYSSES_INFER_TEST_MARK"
PRELUDE = """
import os, signal, subprocess, sys, time
from ulysses_infer.child_processes import end_children_with_this_process, end_with_parent, send
"""
TREE = """
end_children_with_this_process()
sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
subprocess.Popen(sleep)
subprocess.Popen(["sh", "-c", "sleep 100 & sleep 100"], start_new_session=True)
stopped = subprocess.Popen(sleep)
os.kill(stopped.pid, signal.SIGSTOP)
subprocess.run(["sh", "-c", "sleep 100 >/dev/null 2>&1 &"])  # an orphan at once
print("started", flush=True)
"""


@contextlib.contextmanager
def start(code, mark):
    """A Python process that runs `code`, once it has printed a line. Afterwards it is killed, if it still runs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark}
    command = [sys.executable, "-c", PRELUDE + code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def marked(mark):
    """The running processes that `start` started with `mark`, and their children."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def await_count(mark, count, seconds=SECONDS):
    """The processes with `mark`, once there are `count` of them."""
    deadline = time.monotonic() + seconds
    while len(found := marked(mark)) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == count, [process.cmdline() for process in found]
    return found


def assert_gone(mark, seconds=SECONDS):
    """Nothing with `mark` runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = [(process.pid, process.cmdline()) for process in left]
    for process in left:
        process.kill()
    assert names == []


def test_everything_ends_with_a_killed_program(tmp_path):
    with start(TREE + "time.sleep(100)", str(tmp_path)) as process:
        await_count(str(tmp_path), 8)  # itself, the keeper, five sleeps and a shell
        process.kill()
    assert_gone(str(tmp_path))


def test_everything_ends_with_a_program_that_ends(tmp_path):
    with start(TREE, str(tmp_path)) as process:
        assert process.wait(SECONDS) == 0
    assert_gone(str(tmp_path))


def test_processes_have_time_to_end_by_themselves(tmp_path):
    child = f"time.sleep({GRACE_SECONDS / 2}); open({str(tmp_path / 'end')!r}, 'w').close()"
    code = f"""
end_children_with_this_process()
subprocess.Popen([sys.executable, "-c", {"import time; " + child!r}])
print("started", flush=True)
time.sleep(100)
"""
    with start(code, str(tmp_path)) as process:
        process.kill()
    assert_gone(str(tmp_path))
    assert (tmp_path / "end").exists()


def test_an_inner_program_leaves_what_an_outer_one_started(tmp_path):
    stopped = "os.kill(subprocess.Popen(['sleep', '{}']).pid, signal.SIGSTOP)"  # keepers end it at once
    inner = f"{PRELUDE}end_children_with_this_process(); {stopped.format(100)}"
    code = f"""
end_children_with_this_process()
end_children_with_this_process()  # once is enough
{stopped.format(99)}
subprocess.run([sys.executable, "-c", {inner!r}], check=True)
print("started", flush=True)
time.sleep(100)
"""
    with start(code, str(tmp_path)) as process:
        left = await_count(str(tmp_path), 3)  # itself, the keeper and the outer program's child
        assert ["sleep", "99"] in [each.cmdline() for each in left]
        process.kill()
    assert_gone(str(tmp_path))


def test_a_signal_reaches_a_stopped_process():
    code = """
child = subprocess.Popen(["sleep", "100"])
os.kill(child.pid, signal.SIGSTOP)
send(child.pid, signal.SIGTERM)
print(child.wait(5), flush=True)
"""
    with start(code, "") as process:
        assert process.wait(SECONDS) == 0


def test_a_process_ends_a_given_time_after_its_parent(tmp_path):
    child = PRELUDE + "end_with_parent(os.getppid(), patience=0.5); time.sleep(100)"
    code = f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(1); print('started', flush=True)"
    with start(code, str(tmp_path)) as process:
        process.kill()
    assert_gone(str(tmp_path), seconds=5)


def test_this_test_session_has_a_keeper():
    assert os.environ[VARIABLE]


STARTED_BY = {
    "tools/gpu_driver.py": "tools/run.py",
    "benchmarks/serve_processes.py": "benchmarks/serve_report.py",
    "benchmarks/compare_peers/processes.py": "benchmarks/compare_peers/__main__.py",
    "benchmarks/compare_peers/environments.py": "benchmarks/compare_peers/__main__.py",
    "benchmarks/compare_peers/workers/llama_cpp_batched.py": "benchmarks/compare_peers/__main__.py",
    "tools/clients/aiperf_runs.py": "tools/check_clients.py",
    "tools/clients/guidellm_runs.py": "tools/check_clients.py",
    "tools/clients/llm_comply.py": "tools/check_clients.py",
}
"""Modules that start processes for a program, and the program."""


def starters():
    """The modules of the tools and benchmarks that start processes."""
    paths = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    calls = ("subprocess.Popen(", "subprocess.run(")
    return sorted(str(path.relative_to(ROOT)) for path in paths if any(call in path.read_text() for call in calls))


@pytest.mark.parametrize("path", starters())
def test_every_program_that_starts_processes_has_a_keeper(path):
    assert "    end_children_with_this_process()\n" in (ROOT / STARTED_BY.get(path, path)).read_text()
