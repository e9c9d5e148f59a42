"""A replica: the deployment whose Ray Serve replicas each run one engine on ranks of their own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prometheus_client import Metric
from ray import serve

from ulysses_infer.config import Config
from ulysses_infer.errors import EngineDeadError, OverloadedError, RequestError
from ulysses_infer.job.watchdog import WatchdogClient
from ulysses_infer.model.sampling.seeds import derive_seed
from ulysses_infer.ray.autoscaling import OUTSTANDING_TOKENS
from ulysses_infer.ray.metrics import ReplicaObservatory
from ulysses_infer.ray.ranks import start_ranks
from ulysses_infer.ray.request import RoutedRequest
from ulysses_infer.server.client import DEAD, EngineClient
from ulysses_infer.server.messages import EngineState, Ready, Refused, Stepped, StepReport

END_SECONDS = 5.0  # for the ranks of a drained engine
_encoder = msgspec.msgpack.Encoder()


@dataclass
class ReplicaReport:
    """What the ingress asks each replica for."""

    replica: str
    """Its unique id."""
    info: Ready
    state: EngineState
    steps: list[StepReport] = field(default_factory=list)
    """Those that the ingress has not seen, `started` in seconds after this report: the clocks of nodes differ."""
    last_step: int = -1
    """The number of the latest step."""


class EngineReplica:
    """Owns the rank actors of one engine and passes requests to it, as a job's HTTP process does."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        config = _with_own_seed(config, context.rank.rank)
        self._ranks, connection = await start_ranks(config)
        reader, writer = await asyncio.open_connection(sock=connection)
        self._observatory = ReplicaObservatory(config, self._id)
        self._client = EngineClient(reader, writer, self._observatory, config.server.stream_interval)
        self._listening = asyncio.create_task(self._client.listen())
        await self._client.settled.wait()
        if self._client.info is None:
            raise EngineDeadError(self._client.death)
        self._info = self._client.info
        self._watchdog = self._watch(config.server.heartbeat_timeout)

    def _watch(self, timeout: float) -> WatchdogClient:
        """The engine's failure, or its silence, is this replica's."""
        loop = asyncio.get_running_loop()

        def on_end(reason: str) -> None:
            loop.call_soon_threadsafe(self._client.die, reason)

        return WatchdogClient(self._ranks.watchdog, f"replica {self._id}", timeout, on_end)

    # -- requests ------------------------------------------------------------------------------------------------

    async def generate(self, request: RoutedRequest) -> AsyncIterator[bytes]:
        """Complete a prompt: yields `Stepped` with new tokens, or one `Refused`, as MessagePack.

        Raises `EngineDeadError` if the engine is dead: then another replica can take the request.
        """
        submit = request.submit
        tokens: Any = self._client.generate(submit, request.num_sequences)
        try:
            async with aclosing(tokens) as batches:
                async for batch in batches:
                    yield _encoder.encode(Stepped(self._client.state or self._info.state, None, batch))
        except RequestError as error:
            yield _encoder.encode(Refused(submit.request_id, str(error), "invalid"))
        except OverloadedError as error:
            yield _encoder.encode(Refused(submit.request_id, str(error), "overloaded"))

    async def command(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run an administrative command. Raises `RequestError`, `EngineDeadError`."""
        return await self._client.call(name, **arguments)

    async def report(self, seen: Mapping[str, int] | None = None) -> ReplicaReport:
        """What was loaded, the current load, and the steps since that which the ingress saw last, by replica."""
        last = self._observatory.last_step
        steps = self._observatory.steps_after((seen or {}).get(self._id, last))
        return ReplicaReport(self._id, self._info, self._client.state or self._info.state, steps, last)

    async def metrics(self) -> list[Metric]:
        """The metrics of the engine and its requests, which have this replica's id as a label."""
        return self._observatory.families()

    # -- what Ray Serve calls ------------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if the engine is dead: Serve then starts this replica anew, with new ranks.

        Serve calls this every second.
        """
        self._observatory.repeat()
        if self._client.status == DEAD:
            raise EngineDeadError(self._client.death)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy counts."""
        return {OUTSTANDING_TOKENS: float(self._client.outstanding_tokens())}

    async def record_routing_stats(self) -> dict[str, float]:
        """What the request router needs to know beyond the requests that it routed itself."""
        state = self._client.state or self._info.state
        return {OUTSTANDING_TOKENS: self._client.outstanding_tokens(), "usage": state.kv_cache_usage}

    async def record_replica_metadata(self) -> dict[str, int]:
        """The size of the cache, which bounds the prefixes that the router remembers."""
        return {"num_blocks": self._info.num_blocks}

    async def __del__(self) -> None:
        """End the engine in order. Serve has let every request finish, or its patience has run out."""
        self._watchdog.leave()
        with contextlib.suppress(EngineDeadError, TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._client.call("drain")
                await self._client.ended.wait()
                await self._ranks.wait(END_SECONDS)


def _with_own_seed(config: Config, rank: int) -> Config:
    """The seeds of replicas differ, because equal ones would draw the same random numbers. rank: of the replica."""
    if config.model.seed is None or rank == 0:
        return config
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, seed=derive_seed(config.model.seed, rank))
    )
