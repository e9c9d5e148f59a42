"""The watchdog ends the job, naming the process, when any process dies, hangs or gets stuck."""

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

KEEP_LOCK = """
import ctypes
def keep_lock(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # with Python's global lock
"""
SERVER = f"""{KEEP_LOCK}
import json, sys, time
from ulysses_infer.job.watchdog_server import WatchdogServer
server = WatchdogServer("127.0.0.1", 1.5, float(sys.argv[1]))
server.on_end = lambda reason: print("end", reason, flush=True)
print(json.dumps(server.address), flush=True)
for line in sys.stdin:
    match line.split():
        case ["clients"]: print(json.dumps(server.client_names), flush=True)
        case ["stick"]:
            with server.working():
                time.sleep(60)
        case ["silent"]:
            with server.silent(20.0):
                keep_lock(3.0)
            print("back", flush=True)
        case ["fail", reason]: server.fail(reason)
        case ["drain"]: server.announce_drain()
        case ["leave"]:
            server.leave(1.0)
            break
"""
CLIENT = f"""{KEEP_LOCK}
import json, sys, time
from ulysses_infer.job.watchdog import Address, WatchdogClient
host, port, auth_token, process = json.loads(sys.argv[1])
client = WatchdogClient(Address(host, port, auth_token, tuple(process)), sys.argv[2], 1.5)
print("ready", flush=True)
for line in sys.stdin:
    match line.split():
        case ["fail"]:
            client.report("the disk\\nis full")
            sys.exit(3)
        case ["silent", seconds, announced]:
            with client.silent(float(announced)):
                keep_lock(float(seconds))
            print("back", flush=True)
        case ["leave"]:
            client.leave()
            break
        case ["draining"]:
            time.sleep(0.5)
            print(client.is_draining, flush=True)
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

    def ask(self, command):
        self.send(command)
        return self.popen.stdout.readline()

    def send(self, command):
        self.popen.stdin.write(command + "\n")
        self.popen.stdin.flush()

    def end(self, seconds=SECONDS):
        """(exit status, output, errors)"""
        status = self.popen.wait(seconds)
        return status, self.popen.stdout.read(), self.popen.stderr.read()


@contextlib.contextmanager
def job(num_clients, step_timeout=30.0):
    """A watchdog server and its clients."""
    processes = [Process(SERVER, str(step_timeout))]
    try:
        for number in range(1, num_clients + 1):
            processes.append(Process(CLIENT, processes[0].first_line, f"rank {number}"))
        while len(json.loads(processes[0].ask("clients"))) < num_clients:
            time.sleep(0.02)
        yield processes
    finally:
        for process in processes:
            process.popen.kill()
            process.popen.wait()
            for stream in (process.popen.stdin, process.popen.stdout, process.popen.stderr):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def test_nothing_happens_while_all_processes_run_and_at_a_normal_shutdown():
    with job(2) as (server, *clients):
        time.sleep(2.5)  # longer than the silence that counts as a hang
        assert json.loads(server.ask("clients")) == ["rank 1", "rank 2"]
        server.send("drain")
        assert clients[0].ask("draining") == "True\n"
        for client in clients:
            client.send("leave")
            assert client.end()[0] == 0
        server.send("leave")
        assert server.end() == (0, "", "")


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_announces_silence_is_waited_for_and_watched_again_afterwards(silent):
    with job(2) as processes:
        server, *clients = processes
        assert processes[silent].ask("silent 3 20" if silent else "silent") == "back\n"
        assert clients[1].ask("draining") == "False\n"
        assert json.loads(server.ask("clients")) == ["rank 1", "rank 2"]
        clients[0].popen.send_signal(signal.SIGSTOP)
        assert server.end()[1].startswith("end rank 1 has not answered for")


@pytest.mark.parametrize("announced", [0.1, 2.5])
def test_a_process_that_is_silent_for_longer_than_it_announced_hangs(announced):
    with job(2) as (server, *clients):
        clients[0].send(f"silent 30 {announced}")
        reason = server.end()[1]
        assert reason.startswith("end rank 1 has not answered for")
        assert max(announced, 1.5) - 0.5 <= int(reason.split()[-2]) < 10


def test_a_killed_client_ends_the_job_immediately():
    with job(3) as (server, *clients):
        clients[1].popen.kill()
        started = time.monotonic()
        status, output, errors = server.end()
        assert time.monotonic() - started < 4
        assert (status, output) == (1, "end rank 2 ended unexpectedly\n")
        assert "stacks" not in errors
        assert [client.end()[0] for client in (clients[0], clients[2])] == [1, 1]


def test_a_client_reports_why_it_ends():
    with job(2) as (server, *clients):
        clients[0].send("fail")
        assert server.end()[1] == "end rank 1 failed: the disk is full\n"
        assert clients[1].end()[0] == 1


def test_a_stopped_client_is_killed_and_the_others_dump_their_stacks():
    with job(2) as (server, *clients):
        clients[0].popen.send_signal(signal.SIGSTOP)
        status, output, errors = server.end()
        assert status == 1
        assert output.startswith("end rank 1 has not answered for")
        assert "stacks of rank 0" in errors
        assert "in <module>" in errors
        status, _, errors = clients[1].end()
        assert (status, "stacks of rank 2" in errors) == (1, True)
        assert clients[0].end()[0] == -signal.SIGKILL


def test_a_stopped_server_is_killed_by_its_clients():
    with job(2) as (server, *clients):
        server.popen.send_signal(signal.SIGSTOP)
        for client in clients:
            status, _, errors = client.end()
            assert (status, "stacks of rank" in errors) == (1, True)
        assert server.end()[0] == -signal.SIGKILL


def test_a_killed_server_ends_its_clients():
    with job(2) as (server, *clients):
        server.popen.kill()
        assert [client.end()[0] for client in clients] == [1, 1]


def test_after_a_step_that_takes_too_long_every_rank_dumps_its_stacks():
    with job(2, step_timeout=1.0) as (server, *clients):
        server.send("stick")
        status, output, errors = server.end()
        assert (status, output) == (1, "end a step has taken more than 1 s (runtime.step_timeout)\n")
        assert "stacks of rank 0" in errors
        assert all("stacks of rank" in client.end()[2] for client in clients)


def test_a_failure_of_rank_0_ends_every_client():
    with job(2) as (server, *clients):
        server.send("fail overheated")
        assert server.end()[:2] == (1, "end overheated\n")
        assert [client.end()[0] for client in clients] == [1, 1]


@pytest.mark.parametrize("message", [b"hello\n", b"\n", b"\xff\xfe\n", b"GET / HTTP/1.1\r\n\r\n", b""])
def test_a_peer_without_the_auth_token_is_disconnected(message):
    with job(1) as (server, _):
        host, port, *_ = json.loads(server.first_line)
        with socket.create_connection((host, port)) as stranger:
            stranger.settimeout(SECONDS)
            stranger.sendall(message)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):
                    pass  # heartbeats, until the server closes the connection
        assert json.loads(server.ask("clients")) == ["rank 1"]
        assert psutil.Process(server.popen.pid).is_running()
