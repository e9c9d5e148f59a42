"""The deployments of the application, in Ray Serve's terms."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from ulysses_infer.config import Config
from ulysses_infer.ray.autoscaling import OutstandingTokensPolicy
from ulysses_infer.ray.ingress import Ingress
from ulysses_infer.ray.placement import place
from ulysses_infer.ray.recipe import replica_config, routing_options
from ulysses_infer.ray.replica import EngineReplica
from ulysses_infer.ray.router import ReplicaRouter

REPLICAS, INGRESS = "UlyssesReplica", "UlyssesIngress"
HEALTH_SECONDS = 1.0  # between health checks; Serve restarts a replica after three that failed
HEALTH_TIMEOUT = 30.0
STATS_SECONDS = 1.0  # between reports to the request router
END_MARGIN = 15.0  # for the ranks of a drained replica to end
NO_LIMIT = 100_000  # of requests in an ingress or a replica: the engine's own queue is the limit


def bind(config: Config) -> Any:
    """The application of a prepared recipe."""
    replicas = serve.deployment(
        EngineReplica,
        name=REPLICAS,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=place(config).bundles,
        placement_group_strategy=place(config).strategy,
        request_router_config=RequestRouterConfig(
            request_router_class=ReplicaRouter,
            request_router_kwargs=routing_options(config),
            request_routing_stats_period_s=STATS_SECONDS,
        ),
        logging_config=LoggingConfig(enable_access_log=False),  # the ingress calls every replica each second
        **_health(config),
        **_number(config),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=config.ray.ingress_replicas,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=config.server.shutdown_timeout + END_MARGIN,
    )
    return ingress.bind(config, replicas.bind(replica_config(config)))


def _health(config: Config) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": config.server.shutdown_timeout + END_MARGIN,
    }


def _number(config: Config) -> dict[str, Any]:
    """The number of replicas, fixed or scaled by their outstanding tokens."""
    most, ray = config.ray.max_replicas, config.ray
    if most is None or most == config.parallel.dp:
        return {"num_replicas": config.parallel.dp}
    scaling = AutoscalingConfig(
        min_replicas=config.parallel.dp,
        max_replicas=most,
        upscale_delay_s=ray.upscale_delay,
        downscale_delay_s=ray.downscale_delay,
        policy=AutoscalingPolicy(
            policy_function=OutstandingTokensPolicy, policy_kwargs={"target": ray.target_outstanding_tokens}
        ),
    )
    return {"autoscaling_config": scaling}
