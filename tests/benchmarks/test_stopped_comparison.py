"""A comparison of peers that is interrupted or killed: no process is left, and what was measured is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from pathlib import Path
from unittest import mock
from benchmarks.compare_peers import __main__ as program, comparison, measuring, preparing
from benchmarks.compare_peers.programs import LIMITS, Program

WORKER = '''
import subprocess, sys, time
from benchmarks.compare_peers.protocol import serve

def start(options):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    rounds = []
    def measure(task):
        if not task:
            return {"bandwidth": 10e9, "matmul": 1e12}
        rounds.append(0)
        if len(rounds) > 6:  # three measurements per visit: it hangs in the second round
            time.sleep(600)
        tokens = [[5] * task["output_len"] for _ in task["prompts"]]
        return {"first": 0.25, "seconds": 1.0, "tokens": tokens}
    return measure, "1.0"

serve(start)
'''
folder = Path(sys.argv.pop(1))
shape = {name: 8 for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
(folder / "config.json").write_text(json.dumps(shape | heads))
fake = lambda setting: Program([sys.executable, "-c", WORKER], {})
programs = {name: fake for name in (LIMITS, "ours", "llama.cpp")}
mock.patch.object(measuring, "PROGRAMS", programs).start()
mock.patch.object(preparing, "PROGRAMS", programs).start()
mock.patch.object(comparison, "find_model", lambda *_: folder).start()
program.main()
"""


def marked(mark: str) -> list[psutil.Process]:
    """The running processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STOPPED_COMPARISON") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def started(folder: Path) -> subprocess.Popen[str]:
    """A comparison of two contenders that hangs in the second round, once it does."""
    arguments = ["--models", "llama-60m", "--peers", "ours-tp,llama.cpp", "--threads", "1", "--seconds", "0"]
    arguments += ["--environments", str(folder / "environments")]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), *arguments, "--output", str(folder / "out")],
        cwd=ROOT,
        env=os.environ | {"STOPPED_COMPARISON": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and passes that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "out" / "peers.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.thorough),
        pytest.param(signal.SIGKILL, marks=pytest.mark.thorough),
    ],
)
def test_a_stopped_run_leaves_no_process_and_keeps_its_rounds(number: signal.Signals, tmp_path: Path) -> None:
    process = started(tmp_path)
    assert len(marked(str(tmp_path))) >= 7  # the program, three workers, and a process that each of them started

    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)

    deadline = time.monotonic() + 30
    while (left := marked(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    values = json.loads((tmp_path / "out" / "peers.json").read_text())
    assert [len(each["repeats"]) for each in values["models"]["llama-60m"]["contenders"].values()] == [1, 1]
    if number != signal.SIGKILL:
        assert process.returncode == 130, errors
        assert "ours, TP over the ranks" in printed
        assert "processor: " in printed
        assert "written to" in printed
