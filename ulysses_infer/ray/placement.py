"""The placement group of a replica: what Ray reserves for its ranks, and on which nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ulysses_infer.config import Config
from ulysses_infer.errors import ConfigError

STRICT_PACK, STRICT_SPREAD = "STRICT_PACK", "STRICT_SPREAD"


class Placement(NamedTuple):
    """The placement group of one replica. Its first bundle also holds the actor that serves the replica."""

    bundles: list[dict[str, float]]
    """One per node."""
    strategy: str
    ranks_per_node: int

    def bundle_of(self, rank: int) -> int:
        """The bundle of a rank of the replica: neighbouring ranks share a node."""
        return rank // self.ranks_per_node


def place(config: Config) -> Placement:
    """The placement group of a replica; `runtime.device` must be chosen. Raises `ConfigError`."""
    world_size = config.parallel.world_size
    per_node = config.ray.ranks_per_node or world_size
    if world_size % per_node:
        raise ConfigError(
            f"ray.ranks_per_node = {per_node} does not divide the {world_size} ranks of a replica "
            "(parallel.sp * parallel.tp); choose a divisor"
        )
    bundle = {name: amount * per_node for name, amount in rank_resources(config).items()}
    num_nodes = world_size // per_node
    return Placement(
        [dict(bundle) for _ in range(num_nodes)], STRICT_PACK if num_nodes == 1 else STRICT_SPREAD, per_node
    )


def fitting_ranks_per_node(config: Config, nodes: Sequence[Mapping[str, float]]) -> int | None:
    """How many ranks of a replica to put on each node, if no node has room for all; None: all, or no node has any.

    nodes: the resources of each. The number divides the ranks, and enough nodes have room for as many.
    """
    world_size, needed = config.parallel.world_size, rank_resources(config)
    room = [min(int(node.get(name, 0) // amount) for name, amount in needed.items()) for node in nodes]
    if max(room, default=0) >= world_size:
        return None
    divisors = (number for number in range(world_size - 1, 0, -1) if world_size % number == 0)
    return next((each for each in divisors if sum(has >= each for has in room) >= world_size // each), None)


def rank_resources(config: Config) -> dict[str, float]:
    """What Ray reserves for one rank."""
    resources = {"CPU": config.ray.cpus_per_rank}
    return resources if config.runtime.device == "cpu" else {**resources, "GPU": 1.0}
