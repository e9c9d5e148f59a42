"""Prometheus metrics of the engine's load, its cache and its speculation."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter

from ulysses_infer.server.messages import EngineState, OffloadCounts, SnapshotCounts, SpeculationCounts
from ulysses_infer.server.observe.engine_registry import EngineRegistry
from ulysses_infer.server.observe.policies import describe_settings

STEP_TOKEN_BUCKETS = tuple(float(1 << e) for e in range(15))


class _Total:
    """A counter fed with totals. A total that falls means a restart, as in Prometheus."""

    def __init__(self, counter: Counter) -> None:
        self._counter, self._total = counter, 0

    def set(self, total: int) -> None:
        self._counter.inc(total - self._total if total >= self._total else total)
        self._total = total


class _SnapshotMetrics:
    """Snapshots of recurrent states."""

    def __init__(self, metrics: EngineRegistry) -> None:
        self._held = metrics.gauge("state_snapshots", "Snapshots of recurrent states that prompts can start from.")
        self._bytes = metrics.gauge("state_snapshot_bytes", "Memory of these snapshots on each rank.")
        self._hits = _Total(metrics.counter("state_snapshot_hits", "Requests that started from a snapshot."))

    def take(self, counts: SnapshotCounts) -> None:
        self._held.set(counts.num_held)
        self._bytes.set(counts.num_held * counts.num_bytes_each)
        self._hits.set(counts.num_hits)


class _OffloadMetrics:
    """The tier of host memory and disk below the cache, under vLLM's names."""

    def __init__(self, metrics: EngineRegistry) -> None:
        self._totals = [
            _Total(metrics.counter("external_prefix_cache_queries", "Prompt tokens that only the tier could have.")),
            _Total(metrics.counter("external_prefix_cache_hits", "Prompt tokens whose blocks the tier had.")),
            _Total(metrics.counter("kv_offload_store_bytes", "Bytes of evicted blocks, copied on each rank.")),
            _Total(metrics.counter("kv_offload_load_bytes", "Bytes of blocks that came back, copied on each rank.")),
        ]
        self._host = metrics.gauge("kv_offload_cpu_cache_usage_perc", "Share of its host memory in use, 0 to 1.")
        self._disk = metrics.gauge("kv_offload_disk_cache_usage_perc", "Share of its disk space in use, 0 to 1.")

    def take(self, counts: OffloadCounts) -> None:
        values = (counts.num_queries, counts.num_hits, counts.stored_bytes, counts.loaded_bytes)
        for total, count in zip(self._totals, values, strict=True):
            total.set(count)
        self._host.set(counts.host_usage)
        self._disk.set(counts.disk_usage)


class _SpeculationMetrics:
    """Speculative decoding, under vLLM's names."""

    def __init__(self, metrics: EngineRegistry) -> None:
        self._metrics = metrics
        self._totals = [
            _Total(metrics.counter("spec_decode_num_drafts", "Requests with drafted tokens, summed over steps.")),
            _Total(metrics.counter("spec_decode_num_draft_tokens", "Drafted tokens that steps verified.")),
            _Total(metrics.counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")),
        ]
        self._accepted = metrics.counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted drafted tokens by position in the draft.", "position"
        )
        self._positions: list[_Total] = []

    def take(self, counts: SpeculationCounts) -> None:
        values = (counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens)
        for total, count in zip(self._totals, values, strict=True):
            total.set(count)
        for position in range(len(self._positions), len(counts.num_accepted_per_position)):
            self._positions.append(_Total(self._metrics.child(self._accepted, str(position))))
        for total, count in zip(self._positions, counts.num_accepted_per_position, strict=False):
            total.set(count)


class EngineMetrics:
    """The load of the engine and its cache."""

    def __init__(self, metrics: EngineRegistry) -> None:
        self.up = metrics.gauge("engine_up", "1 while the engine can answer, 0 while it loads or is dead.")
        self.dead_replicas = metrics.gauge("num_dead_replicas", "Replicas that are dead while others serve.")
        self.running = metrics.gauge("num_requests_running", "Requests in steps.")
        self.waiting = metrics.gauge("num_requests_waiting", "Requests that wait for a place.")
        self.cache_usage = metrics.gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.")
        self.policy = metrics.info("policy", "The policy that chooses the mode of each step, and its settings.")
        self.step_tokens = metrics.histogram("iteration_tokens_total", "Tokens of a step.", STEP_TOKEN_BUCKETS)
        self._totals = [
            _Total(metrics.counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")),
            _Total(metrics.counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")),
            _Total(metrics.counter("num_preemptions", "Requests sent back to wait because blocks ran out.")),
        ]
        self._snapshots = _SnapshotMetrics(metrics)
        self._speculation = _SpeculationMetrics(metrics)
        self._offload = _OffloadMetrics(metrics)
        self._expert_tokens = metrics.counter("expert_tokens", "Tokens computed by the experts of a rank.", "rank")
        self._of_ranks: list[_Total] = []
        self._metrics = metrics
        self._policy: dict[str, Any] = {}

    def take(self, state: EngineState) -> None:
        """The engine's current load."""
        self.running.set(state.num_running)
        self.waiting.set(state.num_waiting)
        self.cache_usage.set(state.kv_cache_usage)
        counts = (state.prefix_cache_queries, state.prefix_cache_hits, state.num_preemptions)
        for total, count in zip(self._totals, counts, strict=True):
            total.set(count)
        if state.snapshots is not None:
            self._snapshots.take(state.snapshots)
        if state.speculation is not None:
            self._speculation.take(state.speculation)
        if state.offload is not None:
            self._offload.take(state.offload)
        for rank in range(len(self._of_ranks), len(state.expert_tokens)):
            self._of_ranks.append(_Total(self._metrics.child(self._expert_tokens, str(rank))))
        for total, count in zip(self._of_ranks, state.expert_tokens, strict=False):
            total.set(count)
        if state.policy != self._policy:
            self._policy = state.policy
            self.policy.info({"policy": str(state.policy["name"]), "settings": describe_settings(state.policy)})
