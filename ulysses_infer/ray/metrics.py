"""Metrics of each replica, exported by Ray with the labels of the replica."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.server.client import RequestRecord
from ulysses_infer.server.messages import EngineState, Ready, StepReport
from ulysses_infer.server.observe.metrics import FIRST_TOKEN_BUCKETS, INTER_TOKEN_BUCKETS

PREFIX = "ulysses_"


class ReplicaMetrics:
    """An `Observer` of a replica's engine client. Names are those of `/metrics`, with `ulysses_` for `ulysses:`."""

    def __init__(self) -> None:
        self._running = Gauge(PREFIX + "num_requests_running", "Requests in the running batch.")
        self._waiting = Gauge(PREFIX + "num_requests_waiting", "Requests that wait.")
        self._usage = Gauge(PREFIX + "kv_cache_usage_perc", "Used share of the cache, 0 to 1.")
        self._up = Gauge(PREFIX + "engine_up", "1 while the engine is alive.")
        self._queries = Counter(PREFIX + "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = Counter(PREFIX + "prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = Counter(PREFIX + "num_preemptions", "Requests put back to wait for lack of blocks.")
        self._steps = Counter(PREFIX + "steps", "Engine steps.", tag_keys=("mode",))
        self._tokens = Counter(PREFIX + "tokens", "Tokens computed in steps.", tag_keys=("mode",))
        self._generated = Counter(PREFIX + "generation_tokens", "Output tokens.")
        self._first_token = Histogram(
            PREFIX + "time_to_first_token_seconds", "Seconds to the first token.", list(FIRST_TOKEN_BUCKETS)
        )
        self._inter_token = Histogram(
            PREFIX + "inter_token_latency_seconds", "Seconds between tokens.", list(INTER_TOKEN_BUCKETS)
        )
        self._state: EngineState | None = None

    def on_ready(self, info: Ready) -> None:
        """The engine is up."""
        self._up.set(1)
        self.on_step(info.state, None)

    def on_step(self, state: EngineState, step: StepReport | None) -> None:
        """A step ran, or the state changed without one."""
        self._running.set(state.num_running)
        self._waiting.set(state.num_waiting)
        self._usage.set(state.kv_cache_usage)
        for counter, name in (
            (self._queries, "prefix_cache_queries"),
            (self._hits, "prefix_cache_hits"),
            (self._preemptions, "num_preemptions"),
        ):
            _add(counter, getattr(state, name) - (0 if self._state is None else getattr(self._state, name)))
        self._state = state
        if step is not None:
            tags = {"mode": str(Mode(*step.mode))}
            self._steps.inc(1, tags)
            _add(self._tokens, step.num_tokens, tags)

    def on_first_token(self, record: RequestRecord) -> None:
        """A request's first token has arrived."""
        assert record.first_token_time is not None
        self._first_token.observe(record.first_token_time - record.arrival_time)

    def on_tokens(self, record: RequestRecord, seconds: float) -> None:
        """A sequence got another token."""
        self._inter_token.observe(seconds)

    def on_finish(self, record: RequestRecord) -> None:
        """A request ended."""
        _add(self._generated, record.num_output_tokens)

    def on_draining(self, deadline: float) -> None:
        """The replica ends."""

    def on_dead(self, reason: str) -> None:
        """The engine is dead."""
        self._up.set(0)


def _add(counter: Counter, amount: int, tags: dict[str, str] | None = None) -> None:
    """Ray's counters refuse an increment of 0."""
    if amount > 0:
        counter.inc(amount, tags)
