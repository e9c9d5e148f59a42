"""Processes that watch each other: whoever dies, hangs or gets stuck ends the job, by name and in time."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 8.0

HUB = """
import json, sys, time
from ulysses_infer.job.watchdog import WatchdogServer
hub = WatchdogServer("127.0.0.1", 1.5, float(sys.argv[1]))
hub.on_end = lambda reason: print("end", reason, flush=True)
print(json.dumps(hub.address), flush=True)
for line in sys.stdin:
    match line.split():
        case ["members"]: print(json.dumps(hub.members), flush=True)
        case ["stick"]:
            with hub.working():
                time.sleep(60)
        case ["fail", reason]: hub.fail(reason)
        case ["drain"]: hub.announce_drain()
        case ["leave"]:
            hub.leave(1.0)
            break
"""
MEMBER = """
import json, sys, time
from ulysses_infer.job.watchdog import Address, WatchdogClient
host, port, word, process = json.loads(sys.argv[1])
member = WatchdogClient(Address(host, port, word, tuple(process)), sys.argv[2], 1.5)
print("ready", flush=True)
for line in sys.stdin:
    match line.split():
        case ["fail"]:
            member.report("the disk\\nis full")
            sys.exit(3)
        case ["leave"]:
            member.leave()
            break
        case ["draining"]:
            time.sleep(0.5)
            print(member.is_draining, flush=True)
"""


class Process:
    def __init__(self, code, *arguments):
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.first_line = self.popen.stdout.readline()

    def ask(self, words):
        self.tell(words)
        return self.popen.stdout.readline()

    def tell(self, words):
        self.popen.stdin.write(words + "\n")
        self.popen.stdin.flush()

    def end(self, seconds=SECONDS):
        """(exit status, output, errors)"""
        status = self.popen.wait(seconds)
        return status, self.popen.stdout.read(), self.popen.stderr.read()


@contextlib.contextmanager
def job(num_members, step_timeout=30.0):
    """A hub and its members."""
    processes = [Process(HUB, str(step_timeout))]
    try:
        for number in range(1, num_members + 1):
            processes.append(Process(MEMBER, processes[0].first_line, f"rank {number}"))
        while len(json.loads(processes[0].ask("members"))) < num_members:
            time.sleep(0.02)
        yield processes
    finally:
        for process in processes:
            process.popen.kill()
            process.popen.wait()
            for stream in (process.popen.stdin, process.popen.stdout, process.popen.stderr):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def test_all_is_quiet_while_everyone_lives_and_at_an_orderly_end():
    with job(2) as (hub, *members):
        time.sleep(2.5)  # longer than the silence that counts as a hang
        assert json.loads(hub.ask("members")) == ["rank 1", "rank 2"]
        hub.tell("drain")
        assert members[0].ask("draining") == "True\n"
        for member in members:
            member.tell("leave")
            assert member.end()[0] == 0
        hub.tell("leave")
        assert hub.end() == (0, "", "")


def test_a_killed_member_ends_the_job_at_once():
    with job(3) as (hub, *members):
        members[1].popen.kill()
        started = time.monotonic()
        status, output, errors = hub.end()
        assert time.monotonic() - started < 4
        assert (status, output) == (1, "end rank 2 ended unexpectedly\n")
        assert "stacks" not in errors
        assert [member.end()[0] for member in (members[0], members[2])] == [1, 1]


def test_a_member_says_why_it_ends():
    with job(2) as (hub, *members):
        members[0].tell("fail")
        assert hub.end()[1] == "end rank 1 failed: the disk is full\n"
        assert members[1].end()[0] == 1


def test_a_stopped_member_is_noticed_and_killed_and_the_others_write_down_where_they_were():
    with job(2) as (hub, *members):
        members[0].popen.send_signal(signal.SIGSTOP)
        status, output, errors = hub.end()
        assert status == 1
        assert output.startswith("end rank 1 has not answered for")
        assert "stacks of rank 0" in errors
        assert "in <module>" in errors
        status, _, errors = members[1].end()
        assert (status, "stacks of rank 2" in errors) == (1, True)
        assert members[0].end()[0] == -signal.SIGKILL


def test_a_stopped_hub_is_killed_by_its_members():
    with job(2) as (hub, *members):
        hub.popen.send_signal(signal.SIGSTOP)
        for member in members:
            status, _, errors = member.end()
            assert (status, "stacks of rank" in errors) == (1, True)
        assert hub.end()[0] == -signal.SIGKILL


def test_a_killed_hub_ends_its_members():
    with job(2) as (hub, *members):
        hub.popen.kill()
        assert [member.end()[0] for member in members] == [1, 1]


def test_a_step_that_takes_too_long_shows_every_rank_where_it_is_stuck():
    with job(2, step_timeout=1.0) as (hub, *members):
        hub.tell("stick")
        status, output, errors = hub.end()
        assert (status, output) == (1, "end a step has taken more than 1 s (runtime.step_timeout)\n")
        assert "stacks of rank 0" in errors
        assert all("stacks of rank" in member.end()[2] for member in members)


def test_a_failure_of_rank_0_itself_reaches_everyone():
    with job(2) as (hub, *members):
        hub.tell("fail overheated")
        assert hub.end()[:2] == (1, "end overheated\n")
        assert [member.end()[0] for member in members] == [1, 1]


@pytest.mark.parametrize("words", [b"hello\n", b"\n", b"\xff\xfe\n", b"GET / HTTP/1.1\r\n\r\n", b""])
def test_whoever_does_not_know_the_word_is_shown_the_door(words):
    with job(1) as (hub, _):
        host, port, *_ = json.loads(hub.first_line)
        with socket.create_connection((host, port)) as stranger:
            stranger.settimeout(SECONDS)
            stranger.sendall(words)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):
                    pass  # beats, until the hub closes the connection
        assert json.loads(hub.ask("members")) == ["rank 1"]
        assert psutil.Process(hub.popen.pid).is_running()
