"""The request router that Ray Serve runs in the ingress: prefix-affine, then least loaded."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ulysses_infer.engine.load import outstanding_tokens
from ulysses_infer.ray.autoscaling import OUTSTANDING_TOKENS
from ulysses_infer.ray.choice import Candidate, preferred
from ulysses_infer.ray.prefix_index import PrefixIndex
from ulysses_infer.ray.request import RoutedRequest
from ulysses_infer.server.router import affinity


class ReplicaRouter(RequestRouter):
    """Chooses the replica of each `RoutedRequest` that the ingress sends."""

    queue_len_response_deadline_s = 2.0
    """A replica that is slow to answer has its prefixes still; Serve's default would pass it over after 0.1 s."""

    def initialize_state(self, block_size: int, balance_tokens: int | None, shares_load: bool) -> None:
        """balance_tokens: None to choose by load only. shares_load: other ingress processes route requests too."""
        self._prefixes = PrefixIndex(block_size)
        self._balance_tokens, self._shares_load = balance_tokens, shares_load
        self._placed: dict[str, tuple[str, RoutedRequest]] = {}  # by Serve's id of the request

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas, best first, each a rank of its own: Serve takes the first one that has room."""
        request = _request_of(pending_request)
        if pending_request is None or request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # all candidates are tried in one iteration
        names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        order = preferred(self._candidates(request, names), self._balance_tokens)
        if order:
            self._place(pending_request, order[0], request)
        return [[names[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The replica has taken the request: it will have its prompt cached."""
        request, name = _request_of(pending_request), replica_id.unique_id
        if request is None:
            return
        request.tried.append(name)
        self._place(pending_request, name, request)
        replica = self.curr_replicas.get(replica_id)
        if replica is not None:
            self._prefixes.add(name, self._prefixes.hashes_of(request.submit), _num_blocks(replica))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request has left the replica."""
        self._placed.pop(internal_request_id, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The running replicas have changed: forget the prefixes of those that are gone."""
        super().update_replicas(replicas)
        self._prefixes.keep({replica.replica_id.unique_id for replica in replicas})

    def _place(self, pending_request: PendingRequest, name: str, request: RoutedRequest) -> None:
        self._placed[pending_request.metadata.internal_request_id] = name, request

    def _candidates(self, request: RoutedRequest, replicas: dict[str, RunningReplica]) -> list[Candidate]:
        hashes = self._prefixes.hashes_of(request.submit)
        loads = self._loads()
        return [
            Candidate(
                name,
                self._prefixes.num_cached_tokens(name, hashes),
                max(loads.get(name, 0), int(_reported(replica, OUTSTANDING_TOKENS)) if self._shares_load else 0),
                _reported(replica, "usage"),
                self._prefixes.num_blocks(name),
                name in request.tried,
                affinity(request.submit.cache_key, name) if request.submit.cache_key else b"",
            )
            for name, replica in replicas.items()
        ]

    def _loads(self) -> dict[str, int]:
        """The outstanding tokens of the requests that this router has placed, by replica."""
        for key in [key for key, (_, request) in self._placed.items() if request.is_done]:
            del self._placed[key]
        by_replica: dict[str, list[tuple[int, int]]] = {}
        for name, request in self._placed.values():
            by_replica.setdefault(name, []).append((request.num_sequences, request.num_waiting_tokens))
        return {name: outstanding_tokens(requests) for name, requests in by_replica.items()}


def _request_of(pending_request: PendingRequest | None) -> RoutedRequest | None:
    """The request of a call of `generate`; None for other calls."""
    arguments = [] if pending_request is None else pending_request.args
    return next((each for each in arguments if isinstance(each, RoutedRequest)), None)


def _reported(replica: RunningReplica, name: str) -> float:
    return float((replica.routing_stats or {}).get(name, 0.0))


def _num_blocks(replica: RunningReplica) -> int:
    return int(replica.replica_metadata.get("num_blocks", 0))
