"""`serve --ray` where no Ray cluster runs."""

import contextlib
import shutil
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.ray_serve.cluster import START_SECONDS, Load, lines_until, serve_on_ray
from ulysses_infer.job.processes import free_port

pytest.importorskip("ray.serve", reason='Ray is not installed: pip install "ulysses_infer[ray]"')

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(1800)]

END_SECONDS = 30.0  # Ray's agents alone try for a minute to report to a cluster that is gone


@pytest.fixture
def no_cluster():
    """An environment in which Ray knows no cluster. Its sockets need a short path."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield {"RAY_TMPDIR": folder, "RAY_ADDRESS": ""}
    shutil.rmtree(folder, ignore_errors=True)


def is_running(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for_end(processes):
    """Wait until none runs; zombies have nobody to reap them in a container."""
    deadline = time.monotonic() + END_SECONDS
    while running := [process for process in processes if is_running(process)]:
        assert time.monotonic() < deadline, [process.name() for process in running]
        time.sleep(0.2)


def serve(environment, port):
    return serve_on_ray(environment, **{"server.port": port, "ray.cpus_per_rank": 0.5})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_serve_on_ray_starts_a_cluster_that_ends_with_it(no_cluster, number):
    port = free_port()
    process = serve(no_cluster, port)
    try:
        lines = list(lines_until(process.stdout, f"serving demo on http://127.0.0.1:{port}"))
        (said,) = (line for line in lines if line.startswith("  cluster  "))
        assert "no cluster runs here: started one on this machine, which ends with this command" in said
        with Load(f"http://127.0.0.1:{port}", num_clients=1) as load:
            load.wait_for(1)
        assert load.statuses.keys() == {200}
        started = psutil.Process(process.pid).children(recursive=True)
        assert {"gcs_server", "raylet"} <= {each.name() for each in started}
        process.send_signal(number)
        assert process.wait(START_SECONDS) == (0 if number == signal.SIGTERM else -number)
        wait_for_end(started)
    finally:
        process.kill()


def test_a_cluster_that_has_crashed_is_replaced(no_cluster):
    """`ray start` leaves its address in a file, which is still there when the cluster was killed."""
    folder = Path(no_cluster["RAY_TMPDIR"]) / "ray"
    folder.mkdir()
    (folder / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    process = serve(no_cluster, free_port())
    try:
        assert "no cluster runs here: started one" in list(lines_until(process.stdout, "  cluster  "))[-1]
    finally:
        process.kill()


def test_an_address_without_a_cluster_is_named_in_one_line(no_cluster):
    process = serve({**no_cluster, "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}, free_port())
    _, errors = process.communicate(timeout=START_SECONDS)
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert "no Ray cluster answers there; correct it, or unset it to have one started here" in line
    assert process.returncode == 2
