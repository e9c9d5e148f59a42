"""What a recipe becomes on Ray, and the one line for each that cannot be served there."""

import importlib.util

import pytest

from tests.ray_serve.cluster import RECIPE
from ulysses_infer.cli.arguments import parse
from ulysses_infer.config import load_config
from ulysses_infer.errors import ConfigError
from ulysses_infer.ray import build_app
from ulysses_infer.ray.placement import fitting_ranks_per_node, place
from ulysses_infer.ray.recipe import prepared, replica_config


def config(**changes):
    return load_config({**RECIPE, **changes})


def test_ranks_of_a_replica_are_packed_on_one_node_or_spread_over_as_many_as_asked():
    one = place(config(**{"parallel.sp": 4, "ray.cpus_per_rank": 2}))
    assert one == ([{"CPU": 8.0}], "STRICT_PACK", 4)
    two = place(config(**{"parallel.sp": 4, "ray.ranks_per_node": 2, "runtime.device": "cuda"}))
    assert two == ([{"CPU": 2.0, "GPU": 2.0}] * 2, "STRICT_SPREAD", 2)
    assert [two.bundle_of(rank) for rank in range(4)] == [0, 0, 1, 1]


def test_a_replica_without_room_on_any_node_takes_as_few_nodes_as_have_room():
    four = config(**{"parallel.sp": 4, "ray.cpus_per_rank": 2})
    head, small, large = {"CPU": 1.0}, {"CPU": 5.0}, {"CPU": 8.0, "GPU": 1.0}
    assert fitting_ranks_per_node(four, [head, small, large]) is None
    assert fitting_ranks_per_node(four, [head, small, small]) == 2
    assert fitting_ranks_per_node(four, [small, {"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 3.0}]) == 1
    assert fitting_ranks_per_node(four, [head, small]) is None  # more nodes may come
    four.runtime.device = "cuda"
    assert fitting_ranks_per_node(four, [large] * 4) == 1


def test_the_number_of_replicas_changes_nothing_in_a_replica():
    pytest.importorskip("ray", reason='Ray is not installed: pip install "ulysses_infer[ray]"')
    one, three = config(), config(**{"parallel.dp": 3, "ray.max_replicas": 5})
    assert replica_config(prepared(one)) == replica_config(prepared(three))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.sp": 4, "ray.ranks_per_node": 3}, "ray.ranks_per_node = 3 does not divide the 4 ranks"),
        ({"parallel.dp": 3, "ray.max_replicas": 2}, "ray.max_replicas = 2 is less than parallel.dp = 3"),
        ({"server.tool_call_parser": "none such"}, "none such"),
        ({"ray.routing": "random"}, "ray.routing"),
    ],
)
def test_a_recipe_that_cannot_be_served_is_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError) as caught:
        prepared(config(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else object())
    for action in (lambda: build_app(RECIPE), lambda: parse(["serve", "models/demo", "--ray"]).config()):
        with pytest.raises(ConfigError, match=r'needs ray; install: pip install "ulysses_infer\[ray\]"'):
            action()


def test_ray_takes_no_launcher_and_no_dry_run(monkeypatch):
    with pytest.raises(ConfigError, match="--ray and --dry-run"):
        parse(["serve", "models/demo", "--ray", "--dry-run"]).config()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="without a launcher"):
        parse(["serve", "models/demo", "--ray"]).config()


def test_a_machine_with_too_few_cpus_is_named(monkeypatch):
    ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "ulysses_infer[ray]"')
    from ulysses_infer.ray.command import check_room

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    check_room(config(**{"parallel.sp": 3}))
    with pytest.raises(ConfigError, match="spreads a replica over 2 nodes, and this machine is one"):
        check_room(config(**{"parallel.sp": 2, "ray.ranks_per_node": 1}))
    with pytest.raises(ConfigError, match="2 replicas of 1 ranks and the ingress reserve 5 CPUs, and this machine"):
        check_room(config(**{"parallel.dp": 2, "ray.cpus_per_rank": 2}))
