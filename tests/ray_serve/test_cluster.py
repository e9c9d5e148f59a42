"""Replicas on a local Ray cluster with several raylets, whose ranks, replicas and raylets are killed."""

import os
import subprocess
import sys
import threading

import httpx
import pytest

from tests.ray_serve.cluster import ENVIRONMENT, RECIPE, START_SECONDS, Load, RayCluster, processes

pytest.importorskip("ray.serve", reason='Ray is not installed: pip install "ulysses_infer[ray]"')

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster():
    os.environ.update(ENVIRONMENT)
    cluster = RayCluster(num_nodes=3, cpus_per_node=2)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def three_replicas(cluster):
    cluster.deploy(**{"parallel.dp": 3, "parallel.sp": 2})
    yield cluster
    cluster.delete()


def kill_under_load(cluster, kill):
    """Kill something of one replica: only its requests fail, as retriable; it comes back and serves."""
    before = cluster.wait_for(3)
    with Load(cluster.url, num_clients=6) as load:
        load.wait_for(12)
        kill()
        load.wait_for(12)
        after = cluster.wait_for(3, before)
        load.wait_for(12)
    lost = before.keys() - after.keys()
    assert len(lost) == 1
    assert load.statuses.keys() <= {200, 503}
    assert load.lengths == {24}
    assert len(load.failures) <= 6
    for error in load.failures:
        assert error["code"] == "replica_lost"
        assert next(iter(lost)) in error["message"]
    (new,) = after.keys() - before.keys()
    assert serves(cluster, new)


def serves(cluster, replica):
    """Whether a replica computes requests: it gets some of these, because the load is shared."""
    for _ in range(5):
        with Load(cluster.url, num_clients=6) as load:
            load.wait_for(12)
        if cluster.reports()[replica].state.prefix_cache_queries > 0:
            return load.statuses.keys() == {200}
    return False


def test_a_killed_rank_takes_only_its_replica_with_it(three_replicas):
    kill_under_load(three_replicas, lambda: processes("ray::RankActor.follow")[0].kill())


def test_a_killed_replica_is_restarted_alone(three_replicas):
    kill_under_load(three_replicas, lambda: processes("UlyssesReplica")[0].kill())


def test_a_killed_raylet_takes_only_the_replica_of_its_node_with_it(three_replicas):
    three_replicas.add_node()
    kill_under_load(three_replicas, lambda: three_replicas.kill_node(three_replicas.nodes.pop(0)))


def test_scaling_up_and_down_loses_no_request(cluster):
    scaling = {"ray.max_replicas": 3, "ray.target_outstanding_tokens": 100}
    cluster.deploy(**scaling, **{"ray.upscale_delay": 1, "ray.downscale_delay": 2})
    try:
        with Load(cluster.url, num_clients=8) as load:
            cluster.wait_for(3)
            load.wait_for(24)
        with Load(cluster.url, num_clients=1) as trickle:
            cluster.wait_for(1)
            trickle.wait_for(4)
        assert load.statuses.keys() | trickle.statuses.keys() == {200}
        assert load.lengths | trickle.lengths == {24}
    finally:
        cluster.delete()


def test_prefix_affine_routing_hits_the_cache_twice_as_often_as_least_loaded(cluster):
    hits = {}
    for routing in ("prefix", "least_loaded"):
        cluster.deploy(**{"parallel.dp": 4, "ray.routing": routing})
        try:
            talk(cluster.url, num_conversations=10, num_turns=3)
            hits[routing] = sum(each.state.prefix_cache_hits for each in cluster.wait_for(4).values())
        finally:
            cluster.delete()
    assert hits["prefix"] >= 2 * hits["least_loaded"] > 0


def talk(url, num_conversations, num_turns):
    """Conversations at the same time: each prompt is the one before, its answer and more."""

    def run(index):
        prompt = f"# conversation {index}\n" + f"def f{index}(x):\n    return x\n" * 4
        with httpx.Client(timeout=START_SECONDS) as client:
            for turn in range(num_turns):
                body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
                answer = client.post(f"{url}/v1/completions", json=body)
                assert answer.status_code == 200
                prompt += answer.json()["choices"][0]["text"] + f"\n# turn {turn} of {index}\n" + "y = [1, 2, 3]\n" * 4

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_conversations)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve_on_ray(cluster, **changes):
    """The command `serve --ray`, as a process."""
    arguments = [f"{key}={value}" for key, value in {**RECIPE, "server.port": cluster.port, **changes}.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "ulysses_infer.cli.main", "serve", "--ray", *arguments],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_serve_on_ray_answers_until_a_signal_and_removes_the_application(cluster):
    process = serve_on_ray(cluster)
    try:
        assert any(f"serving demo on {cluster.url}" in line for line in process.stdout)
        with Load(cluster.url, num_clients=1) as load:
            load.wait_for(1)
        assert load.statuses.keys() == {200}
        process.terminate()
        assert process.wait(START_SECONDS) == 0
        assert cluster.applications() == []
    finally:
        process.kill()


def test_a_recipe_that_cannot_be_loaded_ends_serve_on_ray_with_one_line(cluster):
    process = serve_on_ray(cluster, **{"model.path": "models/nonexistent"})
    _, errors = process.communicate(timeout=START_SECONDS)
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert line.startswith("error: Ray Serve could not deploy the recipe: ")
    assert "models/nonexistent" in line
    assert process.returncode == 2
    assert cluster.applications() == []
