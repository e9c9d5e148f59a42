"""The recipe's section on Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_infer.config.option import option

PREFIX, LEAST_LOADED = "prefix", "least_loaded"


@dataclass
class RayConfig:
    """Replicas on a Ray cluster: `serve --ray` and `ulysses_infer.ray.build_app`."""

    max_replicas: int | None = option(
        at_least=1,
        help="Maximum number of replicas. Replicas are added and removed between parallel.dp and this number, by "
        "their outstanding tokens; null: always parallel.dp.",
    )
    target_outstanding_tokens: int = option(
        8192,
        at_least=1,
        help="Outstanding tokens per replica that autoscaling aims at: prompt tokens not computed yet, and 64 for "
        "every unfinished sequence.",
    )
    upscale_delay: float = option(30.0, at_least=0, help="Seconds of more load before replicas are added.")
    downscale_delay: float = option(600.0, at_least=0, help="Seconds of less load before replicas are removed.")
    routing: str = option(
        PREFIX,
        choices=(PREFIX, LEAST_LOADED),
        help="Replica of a request. prefix: the one with the longest cached prefix of its prompt, then the least "
        "loaded; least_loaded: the one with the fewest outstanding tokens.",
    )
    balance_tokens: int = option(
        4096,
        at_least=0,
        help="With routing prefix, a replica with this many outstanding tokens more than the least loaded one is used "
        "only if all others fail.",
    )
    ingress_replicas: int = option(
        1, at_least=1, help="Processes that answer HTTP requests. Stored responses (/v1/responses) need a single one."
    )
    cpus_per_rank: float = option(1.0, above=0, help="CPUs that Ray reserves for each rank.")
    ranks_per_node: int | None = option(
        at_least=1,
        help="Ranks of a replica on each node; must divide sp * tp. null: all ranks of a replica are on one node, or "
        "on as few as have room if no node of the cluster has room for all.",
    )
