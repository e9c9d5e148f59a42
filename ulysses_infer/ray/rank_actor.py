"""One rank of a replica as a Ray actor. Ray is the launcher: it sets what `start_rank` reads from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from ulysses_infer.config import Config
from ulysses_infer.console.library_logging import quiet_libraries, set_up_logging
from ulysses_infer.console.screen import make_console
from ulysses_infer.job.lifetime import Guard
from ulysses_infer.job.processes import free_port
from ulysses_infer.job.watchdog import Address
from ulysses_infer.job.watchdog_server import WatchdogServer
from ulysses_infer.server.engine_loop import EngineLoop, describe_engine
from ulysses_infer.server.link import Link
from ulysses_infer.server.messages import Dead
from ulysses_infer.server.replicas import LeaderEndpoint, Replica
from ulysses_infer.server.serve import end_engine, run_follower, start_engine
from ulysses_infer.worker.memory import relax_gc

STOP_SECONDS = 3.0  # for other ranks to leave at a normal end
DEAD_SECONDS = 0.3  # for the replica to read why its engine ends


class RankPlace(NamedTuple):
    """Where Ray has put a rank."""

    node: str
    address: str
    gpus: list[str]
    """As CUDA_VISIBLE_DEVICES names them."""
    port: int
    """Free on this node."""


class RankActor:
    """A rank. Its process does nothing else; `lead` and `follow` return when the engine has ended in order."""

    def __init__(self) -> None:
        self._watchdog: WatchdogServer | None = None

    def place(self) -> RankPlace:
        """Where this actor runs."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return RankPlace(context.get_node_id(), ray.util.get_node_ip_address(), gpus, free_port())

    def prepare(self, config: Config, rank: int, environment: dict[str, str]) -> Address | None:
        """Set what a launcher would set, before any device is used. On rank 0: start the watchdog of the replica and
        return its address."""
        os.environ.update(environment)
        relax_gc()
        quiet_libraries(rank)
        set_up_logging(config.runtime.log_level, rank)
        if rank > 0:
            return None
        server, limit = config.server, config.runtime.step_timeout
        self._watchdog = WatchdogServer(os.environ["MASTER_ADDR"], server.heartbeat_timeout, limit)
        return self._watchdog.address

    def lead(self, config: Config, endpoint: LeaderEndpoint) -> None:
        """Rank 0: load the model, connect to the replica at `endpoint` and serve it. Raises `UlyssesError`."""
        watchdog = self._watchdog
        assert watchdog is not None
        rank, engine, weight_bytes = start_engine(Replica.of(config, 0), watchdog.address, make_console(0))
        link = Link(endpoint.connect(0))
        watchdog.on_end = lambda reason: link.send_last(Dead(reason), DEAD_SECONDS)
        loop = EngineLoop(engine, link, watchdog, config.server)
        loop.run(describe_engine(engine, weight_bytes, loop.state()))
        end_engine(rank)
        watchdog.leave(STOP_SECONDS)

    def follow(self, config: Config, rank: int) -> None:
        """Any other rank: run the plans of rank 0. Raises `UlyssesError`."""
        run_follower(Replica.of(config, rank), rank, RaysGuard())


class RaysGuard(Guard):
    """Leaves signals to Ray, which ends the actors of a replica with it."""

    def __init__(self) -> None:
        pass

    def take_over(self, on_signal: Callable[[int], None], on_orphaned: Callable[[], None]) -> None:
        """Does nothing."""


def environment_of(rank: int, places: list[RankPlace]) -> dict[str, str]:
    """The environment of a rank among those at `places`, as a launcher sets it.

    Every rank sees the GPUs of all ranks on its node, because they read each other's memory.
    """
    own = places[rank]
    on_node = [other for other, place in enumerate(places) if place.node == own.node]
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(places)),
        "LOCAL_RANK": str(on_node.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(on_node)),
        "MASTER_ADDR": places[0].address,
        "MASTER_PORT": str(places[0].port),
    }
    if own.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in on_node for gpu in places[other].gpus)
    return variables
