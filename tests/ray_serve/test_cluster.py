"""Replicas on a local Ray cluster with several raylets, whose ranks, replicas and raylets are killed."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ray_serve.cluster import (
    ENVIRONMENT,
    RECIPE,
    START_SECONDS,
    Load,
    RayCluster,
    lines_until,
    processes,
    serve_on_ray,
)

pytest.importorskip("ray.serve", reason='Ray is not installed: pip install "ulysses_infer[ray]"')

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(1800)]

DEMO = RECIPE["model.path"]
BLOCK_SIZE = RECIPE["cache.block_size"]
PROMPT = "def main():\n    return "


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
    with Load(cluster.url, num_clients=1) as trickle:  # two cores start ranks slowly while they compute for others
        after = cluster.wait_for(3, before)
        trickle.wait_for(4)
    lost = before.keys() - after.keys()
    assert len(lost) == 1
    failures = load.failures + trickle.failures
    assert load.statuses.keys() | trickle.statuses.keys() <= {200, 503}
    assert load.lengths == trickle.lengths == {24}
    assert len(failures) <= 6
    for error in failures:
        assert error["code"] == "replica_lost"
        assert next(iter(lost)) in error["message"]
    (new,) = after.keys() - before.keys()
    assert serves(cluster, new)


def serves(cluster, replica):
    """Whether a replica computes requests: it gets some of these, because the load is shared."""
    for _ in range(5):
        with Load(cluster.url, num_clients=6) as load:
            load.wait_for(12)
        report = cluster.reports().get(replica)
        if report is not None and report.state.prefix_cache_queries > 0:
            return load.statuses.keys() == {200}
    return False


def test_a_killed_rank_takes_only_its_replica_with_it(three_replicas):
    kill_under_load(three_replicas, lambda: processes("ray::RankActor.follow")[0].kill())


def test_a_killed_replica_is_restarted_alone(three_replicas):
    kill_under_load(three_replicas, lambda: processes("UlyssesReplica")[0].kill())


def test_a_killed_raylet_takes_only_the_replica_of_its_node_with_it(three_replicas):
    three_replicas.add_node()
    kill_under_load(three_replicas, lambda: three_replicas.kill_node(three_replicas.nodes[0]))


def test_one_scrape_of_the_ingress_has_the_metrics_of_every_replica(three_replicas):
    replicas = three_replicas.wait_for(3)
    with Load(three_replicas.url, num_clients=6) as load:
        load.wait_for(18)
    found = three_replicas.scrape()
    assert set(found["ulysses:engine_up"].values()) == {1}
    assert found["ulysses:engine_up"].keys() == replicas.keys()
    assert found["ulysses:steps_total"].keys() == replicas.keys()  # each has warmed up in every mode
    assert found["ulysses:time_to_first_token_seconds_count"].keys() == replicas.keys()
    assert sum(found["ulysses:generation_tokens_total"].values()) >= 18 * 24
    assert found["ulysses:http_requests_total"].keys() == {""}
    of_nodes = three_replicas.scrape_nodes()
    assert of_nodes["ray_ulysses_engine_up"] == dict.fromkeys(replicas, 1)
    # Ray's agents keep the counters of processes that have ended, here of the replicas that were killed above
    assert replicas.keys() <= of_nodes["ray_ulysses_steps_total"].keys() <= three_replicas.seen


def test_a_replica_without_room_on_one_node_runs_on_two_and_moves_when_one_dies(cluster):
    cluster.add_node()
    cluster.deploy(**{"parallel.sp": 2, "parallel.tp": 2})
    try:
        before, used = cluster.wait_for(1), cluster.nodes_of_ranks()
        assert len(used) == 2
        assert complete(cluster.url, PROMPT) == expected(PROMPT)
        cluster.kill_node(next(node for node in cluster.nodes if node.node_id in used))
        cluster.wait_for(1, before)
        assert len(cluster.nodes_of_ranks()) == 2
        assert complete(cluster.url, PROMPT) == expected(PROMPT)
    finally:
        cluster.delete()


def complete(url, prompt):
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=START_SECONDS)
    return answer.raise_for_status().json()["choices"][0]["text"]


def expected(prompt):
    """The same by transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(DEMO), AutoModelForCausalLM.from_pretrained(DEMO)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(16):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, -16:])


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
    hits, repeated = {}, {}
    for routing in ("prefix", "least_loaded"):
        cluster.deploy(**{"parallel.dp": 4, "cache.num_blocks": 512, "ray.routing": routing})
        try:
            repeated[routing] = talk(cluster.url, num_conversations=48, num_turns=3)
            hits[routing] = sum(each.state.prefix_cache_hits for each in cluster.wait_for(4).values())
        finally:
            cluster.delete()
    assert hits["prefix"] >= 2 * hits["least_loaded"] > 0
    assert hits["prefix"] >= repeated["prefix"]  # outputs are found, too


def talk(url, num_conversations, num_turns):
    """Conversations at the same time: each prompt is the one before, its answer and more. Returns how many tokens were
    in full blocks of a prompt before.

    The order is another one in each turn, as of people who think, so that the replica whose answer has just ended is
    not more likely than others to get the next turn. There are many, because a few meet the same replica by chance.
    """
    conversations = list(range(num_conversations))
    prompts = [f"# conversation {index}\n" + f"def f{index}(x):\n    return x\n" * 4 for index in conversations]
    repeated, order = 0, random.Random(0)
    with httpx.Client(timeout=START_SECONDS) as client, ThreadPoolExecutor(16) as threads:

        def go_on(index):
            body = {"prompt": prompts[index], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answer = client.post(f"{url}/v1/completions", json=body).raise_for_status().json()
            prompts[index] += answer["choices"][0]["text"] + f"\n# then {index}\n" + "y = [1, 2, 3]\n" * 4
            return answer["usage"]["prompt_tokens"] // BLOCK_SIZE * BLOCK_SIZE

        for turn in range(num_turns):
            order.shuffle(conversations)
            in_full_blocks = sum(threads.map(go_on, conversations))
            repeated += in_full_blocks if turn < num_turns - 1 else 0
    return repeated


def test_serve_on_ray_answers_until_a_signal_and_removes_the_application(cluster):
    process = serve_on_ray({"RAY_ADDRESS": cluster.address}, **{"server.port": cluster.port})
    try:
        lines = list(lines_until(process.stdout, f"serving demo on {cluster.url}"))
        assert any(f"joined the cluster at {cluster.address} (4 nodes" in line for line in lines)
        with Load(cluster.url, num_clients=1) as load:
            load.wait_for(1)
        assert load.statuses.keys() == {200}
        assert {(mode["sp"], mode["tp"]) for mode in steps_shown(cluster)} == {(1, 1)}
        process.terminate()
        assert process.wait(START_SECONDS) == 0
        assert cluster.applications() == []
    finally:
        process.kill()


def steps_shown(cluster):
    """The modes of the steps on the dashboard, once it shows some: it asks the replicas every second."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        data = httpx.get(f"{cluster.url}/dashboard/data", params={"seconds": 300}, timeout=60).json()
        if data["steps"]:
            return [data["modes"][step[3]] for step in data["steps"]]
        time.sleep(0.2)
    raise AssertionError("the dashboard shows no steps")


def test_a_recipe_that_cannot_be_loaded_ends_serve_on_ray_with_one_line(cluster):
    wrong = {"server.port": cluster.port, "model.path": "models/nonexistent"}
    process = serve_on_ray({"RAY_ADDRESS": cluster.address}, **wrong)
    _, errors = process.communicate(timeout=START_SECONDS)
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert line.startswith("error: Ray Serve could not deploy the recipe: ")
    assert "models/nonexistent" in line
    assert process.returncode == 2
    assert cluster.applications() == []
