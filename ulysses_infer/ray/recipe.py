"""The recipe as the parts of the application get it."""

from __future__ import annotations

import copy
from typing import Any

from ulysses_infer.config import Config
from ulysses_infer.config.ray import PREFIX
from ulysses_infer.errors import ConfigError
from ulysses_infer.ray.placement import fitting_ranks_per_node, place
from ulysses_infer.server.process import check


def prepared(config: Config) -> Config:
    """The checked recipe, with its device and the nodes of a replica chosen. Raises `ConfigError`."""
    config = copy.deepcopy(config)
    most = config.ray.max_replicas
    if most is not None and most < config.parallel.dp:
        raise ConfigError(f"ray.max_replicas = {most} is less than parallel.dp = {config.parallel.dp}, the minimum")
    check(config.server)
    if config.runtime.device == "auto":
        config.runtime.device = "cuda" if _has_gpus() else "cpu"
    if config.ray.ranks_per_node is None:
        config.ray.ranks_per_node = fitting_ranks_per_node(config, _nodes())
    place(config)
    return config


def replica_config(config: Config) -> Config:
    """What a replica gets: the recipe without the number of replicas, so that a change of it restarts none. Ranks are
    not pinned, because Ray does not tell which cores are taken."""
    config = copy.deepcopy(config)
    config.parallel.dp = 1
    config.runtime.pin_cores = False
    config.ray.max_replicas = None
    return config


def routing_options(config: Config) -> dict[str, Any]:
    """The arguments of the request router."""
    return {
        "block_size": config.cache.block_size,
        "balance_tokens": config.ray.balance_tokens if config.ray.routing == PREFIX else None,
        "shares_load": config.ray.ingress_replicas > 1,
    }


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that the cluster has now."""
    import ray

    nodes = ray.nodes() if ray.is_initialized() else []
    return [node["Resources"] for node in nodes if node["Alive"]]


def _has_gpus() -> bool:
    """Whether the cluster has GPUs now; one that starts them on demand needs runtime.device: cuda."""
    import ray

    return bool(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)
