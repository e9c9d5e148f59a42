"""Prometheus metrics with vLLM's suffixes, and those of modes and switches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.server.client import RequestRecord
from ulysses_infer.server.messages import EngineState, OffloadCounts, SnapshotCounts, SpeculationCounts, StepReport
from ulysses_infer.server.observe.exposition import exposition
from ulysses_infer.server.observe.policies import describe_settings

PREFIX = "ulysses:"

# vLLM's buckets, so that quantiles of both engines are comparable
FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
INTER_TOKEN_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
REQUEST_BUCKETS = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
TOKEN_BUCKETS = tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5))
STEP_TOKEN_BUCKETS = tuple(float(1 << e) for e in range(15))


class Metrics:
    """The metrics of one server in registries of their own. labels: those of every metric of the engine, such as the
    model's name; their values are bound once, because tokens arrive by the thousands."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        self._labels = dict(labels)
        self._requests = _RequestHistograms(self)
        self._engine = _EngineMetrics(self)
        self._modes: dict[tuple[int, int], _ModeMetrics] = {}
        self._last_mode: _ModeMetrics | None = None
        self._steps = self.counter("steps", "Engine steps.", "mode")
        self._tokens = self.counter("tokens", "Tokens computed in steps, of prompts and outputs.", "mode")
        self._step_seconds = self.histogram("step_seconds", "Seconds a step took.", STEP_BUCKETS, "mode")
        self._switches = self.counter("mode_switches", "Steps in another mode than the step before.", "from", "to")
        self._collectives = self.counter(
            "collective_seconds", "Seconds rank 0 spent in collectives, waiting included.", "op", "mode"
        )
        self._http = _HttpMetrics()

    def engine_families(self) -> list[Metric]:
        """The current values of the engine's metrics and its requests'."""
        return list(self.registry.collect())

    def http_families(self) -> list[Metric]:
        """The current values of the HTTP metrics."""
        return list(self._http.registry.collect())

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return exposition([self.engine_families(), self.http_families()])

    # -- creation --------------------------------------------------------------------------------------------------

    def histogram(self, name: str, meaning: str, buckets: Iterable[float], *labels: str) -> Histogram:
        """A histogram with the engine's labels; bound to them if there are no other `labels`."""
        return self._bound(Histogram, name, meaning, labels, buckets=tuple(buckets))

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        """A counter with the engine's labels; exported as `name`_total."""
        return self._bound(Counter, name, meaning, labels)

    def gauge(self, name: str, meaning: str) -> Gauge:
        """A gauge with the engine's labels."""
        return self._bound(Gauge, name, meaning, ())

    def info(self, name: str, meaning: str) -> Info:
        """Labels with the value 1; exported as `name`_info."""
        return self._bound(Info, name, meaning, ())

    def child(self, metric: Any, *values: str) -> Any:
        """The metric for these values of the labels after the engine's."""
        return metric.labels(*self._labels.values(), *values)

    def _bound(self, kind: Any, name: str, meaning: str, labels: tuple[str, ...], **options: Any) -> Any:
        metric = kind(PREFIX + name, meaning, [*self._labels, *labels], registry=self.registry, **options)
        return metric if labels else self.child(metric)

    # -- events ----------------------------------------------------------------------------------------------------

    def on_up(self, is_up: bool) -> None:
        """The engine is ready, or dead."""
        self._engine.up.set(is_up)

    def on_dead_replicas(self, count: int) -> None:
        """This many replicas are dead while others serve."""
        self._engine.dead_replicas.set(count)

    def on_state(self, state: EngineState) -> None:
        """The engine's current load."""
        self._engine.take(state)

    def on_step(self, step: StepReport) -> None:
        """A step ran."""
        mode = self._modes.get(step.mode)
        if mode is None:
            mode = self._modes[step.mode] = self._mode_metrics(step.mode)
        mode.steps.inc()
        mode.tokens.inc(step.num_tokens)
        mode.seconds.observe(step.seconds)
        self._engine.step_tokens.observe(step.num_tokens)
        for name, seconds in step.collective_seconds.items():
            self.child(self._collectives, name, mode.name).inc(seconds)
        if self._last_mode is not None and self._last_mode is not mode:
            self.child(self._switches, self._last_mode.name, mode.name).inc()
        self._last_mode = mode

    def _mode_metrics(self, mode: tuple[int, int]) -> _ModeMetrics:
        name = str(Mode(*mode))
        children = (self.child(metric, name) for metric in (self._steps, self._tokens, self._step_seconds))
        return _ModeMetrics(name, *children)

    def on_first_token(self, record: RequestRecord, num_new_tokens: int) -> None:
        """A prompt has been computed. num_new_tokens: output tokens since the last report of the request."""
        self._requests.begin(record)
        self._requests.generation_tokens.inc(num_new_tokens)

    def on_tokens(self, seconds: float, num_new_tokens: int) -> None:
        """A sequence got a token, `seconds` after its previous one."""
        self._requests.inter_token.observe(seconds)
        self._requests.generation_tokens.inc(num_new_tokens)

    def on_finish(self, record: RequestRecord, num_new_tokens: int) -> None:
        """A request ended."""
        self._requests.generation_tokens.inc(num_new_tokens)
        self._requests.end(record)

    def on_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered. The numbers of methods and routes are bounded: others count as "other"."""
        self._http.requests.labels(method, route, str(status)).inc()
        self._http.seconds.labels(method, route).observe(seconds)


class _ModeMetrics:
    """The metrics of steps in one mode."""

    def __init__(self, name: str, steps: Counter, tokens: Counter, seconds: Histogram) -> None:
        self.name, self.steps, self.tokens, self.seconds = name, steps, tokens, seconds


class _Total:
    """A counter fed with totals. A total that falls means a restart, as in Prometheus."""

    def __init__(self, counter: Counter) -> None:
        self._counter, self._total = counter, 0

    def set(self, total: int) -> None:
        self._counter.inc(total - self._total if total >= self._total else total)
        self._total = total


class _SnapshotMetrics:
    """Snapshots of recurrent states."""

    def __init__(self, metrics: Metrics) -> None:
        self._held = metrics.gauge("state_snapshots", "Snapshots of recurrent states that prompts can start from.")
        self._bytes = metrics.gauge("state_snapshot_bytes", "Memory of these snapshots on each rank.")
        self._hits = _Total(metrics.counter("state_snapshot_hits", "Requests that started from a snapshot."))

    def take(self, counts: SnapshotCounts) -> None:
        self._held.set(counts.num_held)
        self._bytes.set(counts.num_held * counts.num_bytes_each)
        self._hits.set(counts.num_hits)


class _OffloadMetrics:
    """The tier of host memory and disk below the cache, under vLLM's names."""

    def __init__(self, metrics: Metrics) -> None:
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

    def __init__(self, metrics: Metrics) -> None:
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


class _EngineMetrics:
    """The load of the engine and its cache."""

    def __init__(self, metrics: Metrics) -> None:
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


class _RequestHistograms:
    """The stages of a request: arrival, first step, first token, last token, end."""

    def __init__(self, metrics: Metrics) -> None:
        def stage(name: str, meaning: str, buckets: Iterable[float] = REQUEST_BUCKETS) -> Histogram:
            return metrics.histogram(name, meaning, buckets)

        self._metrics = metrics
        self.first_token = stage(
            "time_to_first_token_seconds", "Seconds from arrival to first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = stage(
            "inter_token_latency_seconds", "Seconds between two tokens of a sequence.", INTER_TOKEN_BUCKETS
        )
        self.per_token = stage(
            "request_time_per_output_token_seconds",
            "Mean seconds per token of a request after its first.",
            INTER_TOKEN_BUCKETS,
        )
        self.total = stage("e2e_request_latency_seconds", "Seconds from arrival to end.")
        self.queue = stage("request_queue_time_seconds", "Seconds from arrival to the first step.")
        self.prefill = stage("request_prefill_time_seconds", "Seconds from the first step to the first token.")
        self.decode = stage("request_decode_time_seconds", "Seconds from first to last token.")
        self.inference = stage("request_inference_time_seconds", "Seconds from the first step to the last token.")
        self.prompt_lengths = stage("request_prompt_tokens", "Tokens of a request's prompt.", TOKEN_BUCKETS)
        self.output_lengths = stage("request_generation_tokens", "Tokens that a request generated.", TOKEN_BUCKETS)
        self.sequences = stage("request_params_n", "Sequences asked for in a request.", (1, 2, 5, 10, 20))
        self.prompt_tokens = metrics.counter("prompt_tokens", "Tokens of prompts computed or found in the cache.")
        self.generation_tokens = metrics.counter("generation_tokens", "Tokens generated.")
        self._success = metrics.counter("request_success", "Requests that ended, by how they did.", "finished_reason")
        reasons = ("stop", "length", "abort", "error")
        self._reasons = {reason: metrics.child(self._success, reason) for reason in reasons}

    def begin(self, record: RequestRecord) -> None:
        assert record.first_token_time is not None
        self.prompt_tokens.inc(record.num_prompt_tokens)
        self.first_token.observe(record.first_token_time - record.arrival_time)

    def end(self, record: RequestRecord) -> None:
        reason = record.finish_reason or "error"
        self._reasons.get(reason, self._reasons["error"]).inc()
        self.prompt_lengths.observe(record.num_prompt_tokens)
        self.output_lengths.observe(record.num_output_tokens)
        self.sequences.observe(record.num_sequences)
        self._span(self.total, record.arrival_time, record.finish_time)
        self._span(self.queue, record.arrival_time, record.scheduled_time)
        self._span(self.prefill, record.scheduled_time, record.first_token_time)
        self._span(self.decode, record.first_token_time, record.last_token_time)
        self._span(self.inference, record.scheduled_time, record.last_token_time)
        self._time_per_token(record)

    def _span(self, histogram: Histogram, start: float | None, end: float | None) -> None:
        """A stage that began and ended."""
        if start is not None and end is not None:
            histogram.observe(max(0.0, end - start))

    def _time_per_token(self, record: RequestRecord) -> None:
        num_intervals = record.num_output_tokens / max(1, record.num_sequences) - 1
        if num_intervals > 0 and record.first_token_time is not None and record.last_token_time is not None:
            self.per_token.observe((record.last_token_time - record.first_token_time) / num_intervals)


class _HttpMetrics:
    """HTTP metrics, regardless of the served model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            PREFIX + "http_requests", "HTTP requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            PREFIX + "http_request_duration_seconds",
            "Seconds from an HTTP request to the end of its answer.",
            ["method", "route"],
            buckets=HTTP_BUCKETS,
            registry=self.registry,
        )
