"""Processes of a server are killed, stopped or made to raise: clients get an error and every process ends in time.

Every case ends with no process left and the port free, within the ten seconds that the server promises.
"""

import os
import signal
import time

import httpx
import psutil
import pytest

from tests.server.job import END_SECONDS, Job

pytestmark = pytest.mark.distributed
LONG = 8000
LARGE = {"cache.num_blocks": 8192}


def job(folder, **changes):
    return Job(folder, **{**LARGE, **changes})


def assert_every_client_gets_an_error(server, streams, seconds=END_SECONDS):
    """Each stream gets an error event, and /health fails until the server is gone."""
    started = time.monotonic()
    statuses = set()
    while (status := server.status("/health")) is not None and time.monotonic() - started < seconds:
        statuses.add(status)
        time.sleep(0.05)
    assert 503 in statuses, statuses
    for stream in streams:
        stream.join(seconds)
        assert stream.errors, (stream.broken, stream.chunks[-1:], server.output)
        assert not stream.chunks[-1]["choices"][0]["finish_reason"]
    server.assert_gone(max(1.0, seconds - (time.monotonic() - started)))
    assert time.monotonic() - started < seconds


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        pytest.param(0, signal.SIGKILL, id="killed-0", marks=pytest.mark.thorough),
        pytest.param(1, signal.SIGKILL, id="killed-1"),
        pytest.param(0, signal.SIGSTOP, id="stopped-0", marks=pytest.mark.thorough),
        pytest.param(1, signal.SIGSTOP, id="stopped-1", marks=pytest.mark.thorough),
    ],
)
def test_a_rank_that_is_killed_or_stopped_ends_the_job(long_folder, rank, number):
    with job(long_folder) as server:
        streams = [server.stream(max_tokens=LONG) for _ in range(3)]
        server.rank(rank).send_signal(number)
        assert_every_client_gets_an_error(server, streams)
        if (rank, number) == (1, signal.SIGKILL):
            assert "rank 1 ended unexpectedly" in streams[0].errors[0]["error"]["message"]
        if (rank, number) == (1, signal.SIGSTOP):
            assert "rank 1 has not answered" in streams[0].errors[0]["error"]["message"]
            assert "stacks of rank 0" in server.output


@pytest.mark.thorough
def test_a_rank_that_dies_while_nothing_runs_ends_the_job(long_folder):
    with job(long_folder) as server:
        assert server.complete().status_code == 200
        server.rank(1).kill()
        assert_every_client_gets_an_error(server, [])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="stopped"),
    ],
)
def test_ranks_do_not_outlive_the_http_process(long_folder, number):
    with job(long_folder) as server:
        server.stream(max_tokens=LONG)
        server.http.send_signal(number)
        server.assert_gone()
        assert server.exit_codes == [1, 1]
        assert "the HTTP process" in server.output


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_an_exception_in_the_forward_pass_of_a_rank_is_reported_to_every_client(long_folder, rank):
    with job(long_folder, fault=f"raise:{rank}:2000") as server:
        streams = [server.stream(max_tokens=LONG) for _ in range(3)]
        assert_every_client_gets_an_error(server, streams, 4 * END_SECONDS)  # 2000 steps take long on a busy machine
        assert "a fault to order" in streams[0].errors[0]["error"]["message"]
        assert "ValueError: a fault to order" in server.output


@pytest.mark.thorough  # stacks of hung ranks: `job/test_watchdog.py`
def test_a_wedged_step_shows_where_each_rank_is_stuck(long_folder):
    with job(long_folder, fault="hang:1:60", **{"runtime.step_timeout": 3}) as server:
        stream = server.stream(max_tokens=LONG)
        assert_every_client_gets_an_error(server, [stream])
        assert "a step has taken more than 3 s" in stream.errors[0]["error"]["message"]
        assert "stacks of rank 0" in server.output
        assert "stacks of rank 1" in server.output
        assert "faulty_run" in server.output


@pytest.mark.parametrize("sp", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_a_signal_drains_and_the_job_ends_in_order(long_folder, sp):
    with job(long_folder, sp=sp) as server:
        streams = [server.stream(max_tokens=300) for _ in range(2)]
        server.rank(0).terminate()
        deadline = time.monotonic() + 5
        while server.status("/ready") == 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.status("/ready") in (503, None)
        with pytest.raises((httpx.HTTPStatusError, httpx.TransportError)):
            server.complete().raise_for_status()
        for stream in streams:
            stream.join()
            assert (stream.finish_reason, stream.done, stream.errors) == ("length", True, [])
        server.assert_gone()
        assert server.exit_codes == [0] * sp


@pytest.mark.thorough
def test_a_second_signal_stops_at_once(long_folder):
    with job(long_folder) as server:
        stream = server.stream(max_tokens=LONG)
        server.rank(0).terminate()
        time.sleep(1.5)
        assert server.status("/health") == 200, "it drains"
        started = time.monotonic()
        server.rank(0).terminate()
        stream.join()
        assert "stopped" in stream.errors[0]["error"]["message"]
        server.assert_gone(5.0)
        assert time.monotonic() - started < 5
        assert server.exit_codes[0] == 128 + signal.SIGTERM


@pytest.mark.thorough
def test_draining_ends_at_its_limit(long_folder):
    with job(long_folder, **{"server.shutdown_timeout": 1}) as server:
        stream = server.stream(max_tokens=LONG)
        server.rank(0).terminate()
        stream.join(10)
        assert "after waiting 1 s" in stream.errors[0]["error"]["message"]
        server.assert_gone()
        assert server.exit_codes == [0, 0]


# -- under launchers -----------------------------------------------------------------------------------------------


@pytest.mark.launcher
@pytest.mark.thorough  # `test_launch.py` kills the launcher of a cheaper command
@pytest.mark.parametrize("which", ["deepspeed", "helper"])
def test_ranks_do_not_outlive_a_killed_launcher(long_folder, which):
    with job(long_folder, how="deepspeed") as server:
        server.stream(max_tokens=LONG)
        command = psutil.Process(server.processes[0].pid)
        victim = command if which == "deepspeed" else psutil.Process(server.rank(0).ppid())
        victim.kill()
        server.assert_gone()


@pytest.mark.launcher
@pytest.mark.thorough
def test_a_signal_to_the_whole_group_of_a_launcher_drains(long_folder):
    with job(long_folder, how="deepspeed") as server:
        stream = server.stream(max_tokens=300)
        os.killpg(server.processes[0].pid, signal.SIGTERM)
        stream.join()
        assert (stream.finish_reason, stream.done) == ("length", True)
        server.assert_gone(2 * END_SECONDS)  # the launcher's helper looks after one rank, then the next


@pytest.mark.launcher
@pytest.mark.thorough  # `test_launch.py` signals a cheaper command; how ranks drain is tested above
def test_the_command_drains_at_the_first_signal_and_passes_the_status_on(long_folder):
    with job(long_folder, how="ulysses-infer") as server:
        server.assert_drains_at_a_signal()


@pytest.mark.launcher
@pytest.mark.thorough  # `cli/test_killed_commands.py` does not wait until the server is ready
def test_nothing_outlives_the_killed_command(long_folder):
    with job(long_folder, how="ulysses-infer") as server:
        server.stream(max_tokens=LONG)
        server.processes[0].kill()
        server.assert_gone()


@pytest.mark.thorough
@pytest.mark.parametrize("how", [pytest.param("nodes", marks=pytest.mark.launcher), "lone ranks"])
def test_two_nodes_serve_as_one_and_end_as_one(long_folder, how):
    with job(long_folder, how=how) as server:
        assert server.complete(max_tokens=20).json()["usage"]["completion_tokens"] == 20
        stream = server.stream(max_tokens=300)
        server.rank(0).terminate()
        stream.join()
        assert (stream.finish_reason, stream.done) == ("length", True)
        server.assert_gone()
        assert server.exit_codes == [0, 0]


@pytest.mark.launcher
@pytest.mark.thorough
def test_a_node_that_loses_its_launcher_ends_the_other_one(long_folder):
    with job(long_folder, how="nodes") as server:
        stream = server.stream(max_tokens=LONG)
        server.processes[1].kill()
        stream.join()
        assert "the launcher of rank 1 was killed" in stream.errors[0]["error"]["message"]
        server.assert_gone()
