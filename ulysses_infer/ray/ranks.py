"""The ranks of a replica: started as actors of its placement group, and connected to its engine client."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from ulysses_infer.config import Config
from ulysses_infer.errors import EngineDeadError
from ulysses_infer.job.watchdog import Address
from ulysses_infer.ray.placement import place, rank_resources
from ulysses_infer.ray.rank_actor import RankActor, environment_of
from ulysses_infer.server.replicas import LeaderAcceptor, make_endpoint


class Ranks:
    """The rank actors of a replica. They end with this process, which owns them."""

    def __init__(self, actors: list[Any], runs: list[asyncio.Task[None]], watchdog: Address) -> None:
        self._actors, self._runs = actors, runs
        self.watchdog = watchdog
        """The address of the replica's watchdog."""

    async def wait(self, seconds: float) -> None:
        """Wait until all ranks have ended, at most this long."""
        await asyncio.wait(self._runs, timeout=seconds)


async def start_ranks(config: Config) -> tuple[Ranks, socket.socket]:
    """Start the ranks in this actor's placement group; returns them with the socket to rank 0's engine.

    Raises what a rank raises while it loads.
    """
    import ray

    actors = _make_actors(config)
    places = await asyncio.gather(*(actor.place.remote() for actor in actors))
    prepared = [actor.prepare.remote(config, rank, environment_of(rank, places)) for rank, actor in enumerate(actors)]
    watchdog, *_ = await asyncio.gather(*prepared)
    listener, endpoint = make_endpoint(ray.util.get_node_ip_address())
    runs = [actors[0].lead.remote(config, endpoint)]
    runs += [actor.follow.remote(config, rank) for rank, actor in enumerate(actors) if rank > 0]
    futures = [asyncio.create_task(_result(run)) for run in runs]
    return Ranks(actors, futures, watchdog), await _accept(LeaderAcceptor(listener, endpoint.auth_token), futures)


def _make_actors(config: Config) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    placement, group = place(config), ray.util.get_current_placement_group()
    resources = rank_resources(config)
    kind = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(RankActor)
    strategies = (
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=placement.bundle_of(rank))
        for rank in range(config.parallel.world_size)
    )
    return [kind.options(scheduling_strategy=strategy).remote() for strategy in strategies]


async def _result(run: Any) -> None:
    await run


async def _accept(acceptor: LeaderAcceptor, runs: list[asyncio.Task[None]]) -> socket.socket:
    """The socket of rank 0, once it has loaded; raises the error of a rank that ends first."""
    waiting = asyncio.create_task(asyncio.to_thread(acceptor.accept, 1))
    ended: set[asyncio.Future[Any]] = {waiting, *runs}
    await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
    acceptor.close()  # the waiting thread must not keep this process alive
    connections = await waiting
    if not connections:
        await asyncio.gather(*(run for run in runs if run.done()))
        raise EngineDeadError("a rank ended while the model was loaded")
    return connections[0]
