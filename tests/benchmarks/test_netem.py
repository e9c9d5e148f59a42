"""Network namespaces for `bench compare`: what can be checked without one, and, as root, that none is left behind."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks import netem

is_possible = os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("tc") is not None
needs_root = pytest.mark.skipif(not is_possible, reason="needs root and iproute2")


def listed() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def can_make() -> bool:
    """Some containers restrict root."""
    made = subprocess.run(["ip", "netns", "add", f"{netem.PREFIX}-{os.getpid()}-probe"], capture_output=True)
    netem.remove([f"{netem.PREFIX}-{os.getpid()}-probe"])
    return made.returncode == 0


def test_missing_requirements_are_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(netem.NetemError, match="need root; run this with sudo"):
        netem.check_possible()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(netem.NetemError, match="install the package iproute2"):
        netem.check_possible()


def test_a_bucket_holds_what_passes_between_two_ticks():
    assert netem.burst_bytes("10gbit") == 10e9 / 8 / 250
    assert netem.burst_bytes("100mbit") == netem.LEAST_BURST


def test_rates_and_delays_are_checked():
    options = netem._parser().parse_known_args(["m", "--rate", "1.5Gbit", "--delay", "50us", "--protocol", "shape"])
    assert (options[0].rate, options[0].delay, options[1]) == ("1.5gbit", "50us", ["m", "--protocol", "shape"])
    for parse, text in ((netem._rate, "fast"), (netem._rate, "0gbit"), (netem._rate, "1gb"), (netem._delay, "5")):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_another_benchmark_runs_on_the_ranks_themselves(monkeypatch, capsys):
    launched = []
    monkeypatch.setattr(netem, "launch", lambda names, arguments: launched.append((names, arguments)) or 3)
    options, rest = netem._parser().parse_known_args(["--bench", "rollouts", "--rate", "1gbit", "m", "parallel.sp=2"])
    assert netem._bench(["a", "b"], options, rest) == 3
    assert launched == [(["a", "b"], ["bench", "rollouts", "m", "parallel.sp=2"])]
    assert capsys.readouterr().out == "link: 1gbit, no delay\n"


@pytest.mark.parametrize(("first", "expected"), [(0, 0), (5, 5)])
def test_ranks_may_end_after_the_first_one_unless_it_failed(monkeypatch, first, expected):
    monkeypatch.setattr(netem, "POLL_SECONDS", 0.01)
    nodes = [subprocess.Popen(["sh", "-c", f"exit {first}"]), subprocess.Popen(["sh", "-c", "sleep 0.3; exit 0"])]
    assert netem._first_status(nodes) == expected
    assert (nodes[1].poll() == 0) is (first == 0)
    nodes[1].wait()


@needs_root
def test_namespaces_reach_each_other_and_are_gone_afterwards():
    if not can_make():
        pytest.skip("namespaces are not permitted here")
    with pytest.raises(RuntimeError, match="on purpose"):
        break_off_in_namespaces()
    assert str(os.getpid()) not in listed()


def break_off_in_namespaces() -> None:
    """Send from one to the other, leave a process in each, and fail."""
    with netem.namespaces(2, None, None) as names:
        assert all(name in listed() for name in names)
        start(names[1], "import time; time.sleep(60)")
        server = start(names[0], ANSWER)
        assert start(names[1], CALL).wait(20) == 0
        assert server.wait(20) == 0
        raise RuntimeError("on purpose")


def start(name: str, program: str) -> subprocess.Popen:
    return subprocess.Popen(["ip", "netns", "exec", name, sys.executable, "-c", program])


ANSWER = "import socket; server = socket.create_server(('10.77.0.1', 5000)); server.settimeout(10); server.accept()"
CALL = """
import socket, time
for _ in range(100):
    try:
        socket.create_connection(("10.77.0.1", 5000), 5)
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
else:
    raise SystemExit(1)
"""


@needs_root
def test_what_a_killed_run_left_is_removed():
    if not can_make():
        pytest.skip("namespaces are not permitted here")
    gone = subprocess.Popen(["true"])
    gone.wait()
    own = f"{netem.PREFIX}-{os.getpid()}-0"
    for name in (f"{netem.PREFIX}-{gone.pid}-0", own):
        subprocess.run(["ip", "netns", "add", name], check=True)
    netem.remove_leftovers()
    assert f"{netem.PREFIX}-{gone.pid}-0" not in listed()
    assert own in listed()
    netem.remove([own])
