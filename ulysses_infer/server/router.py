"""Routes each request to the replica with the least outstanding work, or to that of its cache key.

Goes on without replicas that are dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec

from ulysses_infer.errors import EngineDeadError, ReplicaLostError, RequestError
from ulysses_infer.server.client import DEAD, DEGRADED, DRAINING, READY, STARTING, EngineClient, Observer, RequestRecord
from ulysses_infer.server.messages import (
    EngineState,
    NewToken,
    OffloadCounts,
    Ready,
    SnapshotCounts,
    SpeculationCounts,
    StepReport,
    Submit,
)

Counts = TypeVar("Counts")
EVERYWHERE = (
    "set_policy",
    "abort_all",
    "drain",
    "reset_prefix_cache",
    "pause",
    "resume",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "update_weight_version",
    "sleep",
    "wake_up",
    "load_lora_adapter",
    "unload_lora_adapter",
    "start_profile",
    "stop_profile",
)
"""Commands for all replicas at the same time: some wait for each other."""


class ReplicaObserver(Observer, Protocol):
    """Receives the events of all replicas together."""

    def on_replica_dead(self, dead: Mapping[int, str]) -> None:
        """Another replica is dead while others serve. dead: why each dead one is, by its index."""


class Router:
    """Presents the replicas of one model as one engine, with the part of `EngineClient`'s interface that routes use.

    The requests of a replica that dies fail, or run on another one if they had no token yet; the others go on.
    """

    def __init__(self, observer: ReplicaObserver, num_replicas: int) -> None:
        self._observer = observer
        self.observers = [_ReplicaObserver(self, index) for index in range(num_replicas)]
        """One observer per replica's client."""
        self.clients: list[EngineClient] = []
        """The replicas, in order, once `join` was called."""
        self._states: list[EngineState | None] = [None] * num_replicas
        self._draining: asyncio.Task[Any] | None = None
        self._failure = ""  # before the replicas have joined
        self.settled, self.ended = asyncio.Event(), asyncio.Event()

    def join(self, clients: list[EngineClient]) -> list[asyncio.Task[None]]:
        """Add the clients, made with this router's observers; returns tasks that update `settled` and `ended`."""
        self.clients = clients
        for client in clients:
            client.on_drained = self._leave_if_drained

        async def when_all(events: list[asyncio.Event], then: asyncio.Event) -> None:
            await asyncio.gather(*(event.wait() for event in events))
            then.set()

        return [
            asyncio.create_task(when_all([client.settled for client in clients], self.settled)),
            asyncio.create_task(when_all([client.ended for client in clients], self.ended)),
        ]

    @property
    def status(self) -> str:
        """The worst status of the replicas that live: starting, then draining, then ready, or degraded if some are
        dead; dead if all are."""
        if self._failure:
            return DEAD
        statuses = [client.status for client in self.clients] or [STARTING]
        worst = next(status for status in (STARTING, DRAINING, READY, DEAD) if status in statuses)
        return DEGRADED if worst == READY and DEAD in statuses else worst

    @property
    def alive(self) -> list[EngineClient]:
        """The replicas that are not dead."""
        return [client for client in self.clients if client.status != DEAD]

    @property
    def dead_replicas(self) -> dict[int, str]:
        """Why each dead replica is dead, by its index, while others serve."""
        dead = {index: client.death for index, client in enumerate(self.clients) if client.status == DEAD}
        return dead if len(dead) < len(self.clients) else {}

    @property
    def info(self) -> Ready | None:
        """What was loaded, with the cache of all living replicas summed; None while any is starting."""
        infos = [client.info for client in self.alive if client.info is not None]
        if not infos or len(infos) < len(self.alive):
            return None
        return msgspec.structs.replace(infos[0], num_blocks=sum(info.num_blocks for info in infos), state=self.state)

    @property
    def state(self) -> EngineState | None:
        """The load of all replicas together. Counts of dead replicas remain in it, their load does not."""
        known = [state for state in self._states if state is not None]
        living = [each for index, each in enumerate(self._states) if each and index not in self.dead_replicas]
        return combined_state(known, living) if living else None

    @property
    def death(self) -> str:
        """Why the last replica is dead, in one line; empty while any is alive."""
        return self._failure or ("" if self.alive else next((each.death for each in self.clients if each.death), ""))

    @property
    def num_requests(self) -> int:
        """Number of requests in progress."""
        return sum(client.num_requests for client in self.clients)

    async def generate(self, request: Submit, num_sequences: int = 1) -> AsyncGenerator[list[NewToken]]:
        """Complete a prompt on one replica; see `EngineClient.generate`.

        If that dies before the first token, another one runs the request; later, `ReplicaLostError` is raised.
        """
        has_tokens = False
        while True:
            client = self._choose(request.cache_key)
            batches: Any = client.generate(request, num_sequences)
            try:
                async with aclosing(batches):
                    async for batch in batches:
                        has_tokens = True
                        yield batch
                return
            except EngineDeadError as error:
                if not self.alive or client.death_expected:
                    raise
                if has_tokens:
                    raise ReplicaLostError(
                        f"replica {self.clients.index(client)}, which ran the request, is dead: {error}; send it again"
                    ) from error

    def _choose(self, cache_key: str) -> EngineClient:
        """The least loaded replica that takes requests, or that of the key; if none does, one that says why.

        Each key orders the replicas in its own way and goes to the first that takes requests, so that the death of one
        moves its own keys only (rendezvous hashing: Thaler and Ravishankar, 1996).
        """
        if not self.clients and self._failure:
            raise EngineDeadError(self._failure)
        ready = [client for client in self.clients if client.status == READY]
        if cache_key and ready:
            return max(ready, key=lambda client: affinity(cache_key, self.clients.index(client)))
        return min(ready or self.alive or self.clients, key=load)

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """Run an administrative command on every replica that it concerns. Raises `RequestError`, `EngineDeadError`."""
        if name == "abort":
            return await self._abort(**arguments)
        if name == "stats" and len(self.clients) > 1:
            return {"replicas": [await self._stats(client) for client in self.clients]}
        if name == "init_weight_transfer_engine":
            return (await asyncio.gather(*self._joining(**arguments)))[0]
        if name in EVERYWHERE:
            answers = await self._everywhere(name, **arguments)
            aborted = [request_id for answer in answers for request_id in answer.get("aborted", ())]
            return {**answers[0], **({"aborted": aborted} if name == "abort_all" else {})}
        return await (self.alive or self.clients)[0].call(name, **arguments)

    async def _everywhere(self, name: str, /, **arguments: Any) -> list[Any]:
        """The answers of all living replicas; those that die meanwhile are left out, unless all do."""
        calls = [client.call(name, **arguments) for client in self.alive or self.clients]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refusals = [answer for answer in answers if isinstance(answer, BaseException)]
        for refusal in refusals:
            if not isinstance(refusal, EngineDeadError) or len(refusals) == len(answers):
                raise refusal
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _stats(self, client: EngineClient) -> Any:
        return {"dead": client.death} if client.status == DEAD else await client.call("stats")

    def _joining(self, rank_offset: int = 1, **arguments: Any) -> list[Coroutine[Any, Any, Any]]:
        """Calls that join a trainer's process group: the ranks of each replica after those of the one before."""
        for index, reason in self.dead_replicas.items():
            raise RequestError(f"replica {index} is dead ({reason}) and cannot join; restart the server first")
        sizes = [len(client.info.weight_bytes_per_rank) if client.info else 0 for client in self.clients]
        return [
            client.call("init_weight_transfer_engine", rank_offset=rank_offset + sum(sizes[:index]), **arguments)
            for index, client in enumerate(self.clients)
        ]

    async def _abort(self, request_id: str) -> Any:
        refusal = RequestError(f"no request {request_id!r} is running or waiting; it may have ended")
        for client in self.alive or self.clients:
            try:
                return await client.call("abort", request_id=request_id)
            except RequestError as error:
                refusal = error
        raise refusal

    def _leave_if_drained(self) -> None:
        """Ends the replicas together: some may still have requests to answer."""
        if all(client.is_drained for client in self.alive):
            for client in self.alive:
                client.leave()

    def lose(self, index: int, reason: str) -> None:
        """One replica is known to be lost."""
        self.clients[index].die(reason)

    def die(self, reason: str) -> None:
        """The job is known to be lost."""
        for client in self.clients:
            client.die(reason)
        if not self.clients:
            self._failure = reason
            self._observer.on_dead(reason)
            self.settled.set()
            self.ended.set()

    # -- events from the replicas' observers ---------------------------------------------------------------------

    def on_ready(self) -> None:
        """A replica is up. Reported once all are."""
        info = self.info
        if info is not None:
            self._observer.on_ready(info)

    def on_step(self, index: int, state: EngineState, step: StepReport | None) -> None:
        """A replica ran a step, or its state changed."""
        self._states[index] = state
        combined = self.state
        if combined is None:  # the last replica is dead
            return
        self._observer.on_step(combined, step)

    def on_draining(self, index: int, deadline: float) -> None:
        """One replica drains: drain the others too."""
        if self._draining is None:
            self._observer.on_draining(deadline)
            self._draining = asyncio.create_task(self._drain_others(index))

    async def _drain_others(self, index: int) -> None:
        for client in (client for i, client in enumerate(self.clients) if i != index):
            with contextlib.suppress(EngineDeadError):  # nothing to drain; on_dead reports it
                await client.call("drain")

    def on_dead(self, index: int, reason: str) -> None:
        """One replica is dead; the others go on, unless there are none."""
        if not self.alive:
            self._observer.on_dead(reason)
            return
        state = self._states[index]
        if state is not None:
            self._states[index] = msgspec.structs.replace(state, num_running=0, num_waiting=0)
        if not self.clients[index].death_expected:
            self._observer.on_replica_dead(self.dead_replicas)
        if self.clients[index].info is None:
            self.on_ready()
        self._leave_if_drained()


class _ReplicaObserver:
    """Forwards the events of one replica's client to the router's observer."""

    def __init__(self, router: Router, index: int) -> None:
        self._router, self._index, self._all = router, index, router._observer

    def on_ready(self, info: Ready) -> None:
        """The replica is up."""
        self._router._states[self._index] = info.state
        self._router.on_ready()

    def on_step(self, state: EngineState, step: StepReport | None) -> None:
        """The replica ran a step, or its state changed."""
        self._router.on_step(self._index, state, step)

    def on_first_token(self, record: RequestRecord) -> None:
        """A request's first token has arrived."""
        self._all.on_first_token(record)

    def on_tokens(self, record: RequestRecord, seconds: float) -> None:
        """A sequence got another token."""
        self._all.on_tokens(record, seconds)

    def on_finish(self, record: RequestRecord) -> None:
        """A request ended, unless another replica runs it again."""
        if record.finish_reason != "error" or record.first_token_time is not None or not self._is_lost:
            self._all.on_finish(record)

    @property
    def _is_lost(self) -> bool:
        return self._index in self._router.dead_replicas

    def on_draining(self, deadline: float) -> None:
        """The replica accepts no more requests."""
        self._router.on_draining(self._index, deadline)

    def on_dead(self, reason: str) -> None:
        """The replica is dead."""
        self._router.on_dead(self._index, reason)


def load(client: EngineClient) -> tuple[int, float]:
    """A replica's load: prompts not computed yet and decoding sequences; then its cache usage as a tie-breaker."""
    usage = client.state.kv_cache_usage if client.state is not None else 0.0
    return client.outstanding_tokens(), usage


def affinity(cache_key: str, replica: int | str) -> bytes:
    """The replica with the greatest value is the first for the key."""
    return hashlib.blake2b(f"{replica} {cache_key}".encode(), digest_size=8).digest()


def combined_state(states: list[EngineState], living: list[EngineState] | None = None) -> EngineState:
    """The sum of `states`. living: those of replicas that are not dead; None: all."""
    living = living or states

    def total(of: Callable[[EngineState], int]) -> int:
        return sum(map(of, states))

    return EngineState(
        num_running=total(lambda state: state.num_running),
        num_waiting=total(lambda state: state.num_waiting),
        kv_cache_usage=sum(state.kv_cache_usage for state in living) / len(living),
        prefix_cache_queries=total(lambda state: state.prefix_cache_queries),
        prefix_cache_hits=total(lambda state: state.prefix_cache_hits),
        num_preemptions=total(lambda state: state.num_preemptions),
        policy=living[0].policy,
        expert_tokens=[tokens for state in states for tokens in state.expert_tokens],
        snapshots=_combined(_combined_snapshots, [state.snapshots for state in states]),
        speculation=_combined(_combined_drafts, [state.speculation for state in states]),
        offload=_combined(_combined_offload, [state.offload for state in states]),
    )


def _combined(combine: Callable[[list[Counts]], Counts], counts: Sequence[Counts | None]) -> Counts | None:
    """Of the replicas that count; None if none does."""
    known = [each for each in counts if each is not None]
    return combine(known) if known else None


def _combined_snapshots(counts: list[SnapshotCounts]) -> SnapshotCounts:
    held, slots = sum(each.num_held for each in counts), sum(each.num_slots for each in counts)
    return SnapshotCounts(held, slots, sum(each.num_hits for each in counts), counts[0].num_bytes_each)


def _combined_offload(counts: list[OffloadCounts]) -> OffloadCounts:
    return OffloadCounts(
        sum(each.num_queries for each in counts),
        sum(each.num_hits for each in counts),
        sum(each.stored_bytes for each in counts),
        sum(each.loaded_bytes for each in counts),
        sum(each.host_usage for each in counts) / len(counts),
        sum(each.disk_usage for each in counts) / len(counts),
    )


def _combined_drafts(counts: list[SpeculationCounts]) -> SpeculationCounts:
    return SpeculationCounts(
        sum(each.num_drafts for each in counts),
        sum(each.num_draft_tokens for each in counts),
        sum(each.num_accepted_tokens for each in counts),
        [sum(position) for position in zip(*(each.num_accepted_per_position for each in counts), strict=True)],
    )


Served = EngineClient | Router
"""What routes use: one engine, or several behind a router."""
