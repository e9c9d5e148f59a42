"""A served model as its own processes: started, sent requests, killed, and checked for what it leaves behind."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil

from tests.ranks import start_forked
from ulysses_infer.job.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = "ulysses_infer/launch.py"
START_SECONDS = 120.0
END_SECONDS = 10.0
ADMIN = {"Authorization": "Bearer admin"}
SETTINGS = {
    "cache.num_blocks": 128,
    "cache.block_size": 4,
    "scheduler.max_num_seqs": 16,
    "scheduler.max_num_batched_tokens": 64,
    "runtime.threads_per_rank": 1,
    "runtime.device": "cpu",
    "policy.threshold_tokens": 4,
    "server.admin_api_key": "admin",
    "server.served_model_name": "tiny",
}


def launcher():
    """The `deepspeed` command; all nodes of a job have the port that is chosen here."""
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]


class ForkedRank:
    """A rank without a launcher, forked from a process that has imported everything; as `subprocess.Popen`."""

    def __init__(self, arguments, environment, output):
        with multiprocessing.connection.Connection(os.dup(output), readable=False) as pipe:
            self._process = start_forked(run_rank, arguments, environment, pipe)
        self.pid = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self):
        return self._process.exitcode

    def wait(self, seconds=None):
        self._process.join(seconds)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a rank", seconds)
        return self.poll()


def run_rank(arguments, environment, output):
    """What a forked rank does."""
    os.setsid()
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    from tests.server.rank import start

    start(arguments)


class Job:
    """The processes of one server.

    how: ranks (without a launcher), lone ranks (each as if alone on its host), deepspeed, nodes (of one rank each),
    ulysses-infer.
    """

    def __init__(self, folder, sp=2, dp=1, how="ranks", fault="", **changes):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        keys = {**SETTINGS, "model.path": folder, "parallel.sp": sp, "parallel.dp": dp, "server.port": self.port}
        keys |= changes
        keys.setdefault("model.max_model_len", min(8192, keys["cache.num_blocks"] * keys["cache.block_size"]))
        arguments = ["serve", *(f"{key}={value}" for key, value in keys.items())]
        self._environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "ULYSSES_TEST_FAULT": fault}
        self._environment["PYTHONPATH"] = str(ROOT)
        starters = {
            "ranks": self._start_ranks,
            "lone ranks": self._start_lone_ranks,
            "deepspeed": self._start_deepspeed,
            "nodes": self._start_nodes,
            "ulysses-infer": self._start_cli,
        }
        self.output = ""
        self._pipe, self._write = os.pipe()
        self.processes = starters[how](arguments, sp * dp)
        os.close(self._write)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.all = []

    def _start_ranks(self, arguments, count):
        return self._fork(arguments, [{"LOCAL_WORLD_SIZE": str(count), "LOCAL_RANK": str(n)} for n in range(count)])

    def _start_lone_ranks(self, arguments, count):
        return self._fork(arguments, [{"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}] * count)

    def _fork(self, arguments, places):
        meeting = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [{**self._environment, **meeting, **place} for place in places]
        return [
            ForkedRank(arguments, {**environment, "RANK": str(rank)}, self._write)
            for rank, environment in enumerate(environments)
        ]

    def _start_deepspeed(self, arguments, count):
        return [self._start([*launcher(), "--num_gpus", str(count), LAUNCH, *arguments])]

    def _start_nodes(self, arguments, count):
        with tempfile.NamedTemporaryFile("w", suffix=".hosts", delete=False) as file:
            file.writelines(f"node{number} slots=1\n" for number in range(count))
        command = [*launcher(), "--hostfile", file.name, "--no_ssh", "--master_addr", "127.0.0.1"]
        return [self._start([*command, "--node_rank", str(number), LAUNCH, *arguments]) for number in range(count)]

    def _start_cli(self, arguments, count):
        return [self._start([sys.executable, "-m", "ulysses_infer.cli.main", *arguments])]

    def _start(self, command, **environment):
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self._environment, **environment},
            stdout=self._write,
            stderr=self._write,
            start_new_session=True,
        )

    def _read(self):
        with open(self._pipe, errors="replace") as pipe:
            for line in pipe:
                self.output += line

    # -- while it runs -------------------------------------------------------------------------------------------

    def wait_until_ready(self):
        deadline = time.monotonic() + START_SECONDS
        while self.status("/ready") != 200:
            ended = [process.poll() for process in self.processes]
            assert time.monotonic() < deadline, self.output
            assert ended == [None] * len(ended), self.output
            time.sleep(0.05)
        self.all = [psutil.Process(process.pid) for process in self.processes]
        self.all += [child for process in list(self.all) for child in process.children(recursive=True)]

    def status(self, path):
        """The HTTP status of a GET; None without an answer."""
        try:
            return httpx.get(self.url + path, timeout=5).status_code
        except httpx.TransportError:
            return None

    def rank(self, number):
        """The process of a rank."""
        if isinstance(self.processes[0], ForkedRank):
            return self.all[number]
        for process in self.all:
            with contextlib.suppress(psutil.Error):
                launched = {LAUNCH, str(ROOT / LAUNCH)} & set(process.cmdline())
                if launched and process.environ().get("RANK") == str(number):
                    return process
        raise AssertionError(f"no rank {number} among {self.all}")

    def kept_rank(self, number):
        """The process of a rank of several replicas, a child of the process that was launched."""
        children = self.rank(number).children()
        return next(child for child in children if "ulysses_infer.server.process" not in " ".join(child.cmdline()))

    @property
    def http(self):
        """The HTTP process."""
        return next(process for process in self.all if "ulysses_infer.server.process" in " ".join(process.cmdline()))

    def complete(self, prompt="hello", max_tokens=5, **fields):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return httpx.post(self.url + "/v1/completions", json={**body, **fields}, timeout=60)

    def stream(self, prompt="hello", max_tokens=100):
        """A stream that has given its first chunk."""
        return Stream(self, prompt, max_tokens)

    def stats(self):
        answer = httpx.get(self.url + "/admin/stats", headers=ADMIN, timeout=10)
        assert answer.status_code == 200, f"{answer.text}\n{self.output}"
        return answer.json()

    # -- its end -------------------------------------------------------------------------------------------------

    def left_after(self, seconds):
        """What is left of the job."""
        gone = psutil.wait_procs([process for process in self.all if not is_own(process)], timeout=seconds)[1]
        deadline = time.monotonic() + seconds
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        left = [process.pid for process in self.processes if process.poll() is None]
        return [process.pid for process in gone if process.is_running() and not is_zombie(process)] + left

    def assert_drains_at_a_signal(self):
        """The first process passes the signal on, a running stream ends whole, and the status is 0."""
        stream = self.stream(max_tokens=300)
        self.processes[0].terminate()
        stream.join()
        assert (stream.finish_reason, stream.done) == ("length", True)
        self.assert_gone()
        assert self.exit_codes == [0]

    def assert_gone(self, seconds=END_SECONDS):
        """Every process has ended in time, and the port is free."""
        assert not self.left_after(seconds), self.output
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))

    @property
    def exit_codes(self):
        return [process.wait(END_SECONDS) for process in self.processes]

    def __enter__(self):
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for process in self.all:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        self._reader.join(5)


def is_own(process):
    return process.ppid() == os.getpid() if process.is_running() else False


def is_zombie(process):
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


class Stream:
    """A streamed completion, read in a thread: its chunks, its errors, whether it ended as it should."""

    def __init__(self, job, prompt, max_tokens):
        self.chunks, self.errors, self.done, self.broken = [], [], False, ""
        self._started = threading.Event()
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        self._thread = threading.Thread(target=self._read, args=(job, {**body, "stream": True}), daemon=True)
        self._thread.start()
        assert self._started.wait(60), (self.errors, self.broken)

    def _read(self, job, body):
        try:
            with httpx.stream("POST", job.url + "/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    self._take(line)
        except httpx.TransportError as error:
            self.broken = repr(error)
        self._started.set()

    def _take(self, line):
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            (self.errors if "error" in chunk else self.chunks).append(chunk)
            self._started.set()

    @property
    def finish_reason(self):
        return self.chunks[-1]["choices"][0]["finish_reason"]

    def join(self, seconds=60.0):
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the stream never ended"
        return self
