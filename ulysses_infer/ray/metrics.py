"""Metrics of each replica: for the ingress's `/metrics`, which has those of all, and exported by Ray itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable

from msgspec import structs
from prometheus_client import Metric
from ray.serve.metrics import Counter, Gauge, Histogram

from ulysses_infer.config import Config
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.server.client import RequestRecord
from ulysses_infer.server.messages import EngineState, Ready, StepReport
from ulysses_infer.server.observe import Observatory
from ulysses_infer.server.observe.exposition import exposition
from ulysses_infer.server.observe.request_metrics import FIRST_TOKEN_BUCKETS, INTER_TOKEN_BUCKETS

LABEL = "replica"
PREFIX = "ulysses_"
KEPT_STEPS = 4096  # until the ingress asks for them


class IngressObservatory(Observatory):
    """Of the ingress: the HTTP metrics are its own, those of engines and requests come from the replicas.

    fetch: asks every replica for `ReplicaObservatory.families`.
    """

    def __init__(self, config: Config, fetch: Callable[[], Awaitable[list[list[Metric]]]]) -> None:
        super().__init__(config)
        self._fetch = fetch

    async def scrape(self) -> bytes:
        """The body of `/metrics`. A replica that does not answer is left out."""
        return exposition([*await self._fetch(), self._metrics.http_families()])


class ReplicaObservatory(Observatory):
    """Of a replica: the metrics of a job's server with its id as the label `replica`, and the most important ones as
    Ray's own, which have Ray's labels and `ulysses_` for `ulysses:`."""

    def __init__(self, config: Config, replica: str) -> None:
        super().__init__(config, labels={LABEL: replica})
        self._ray = _RayMetrics()
        self._steps: deque[tuple[float, StepReport]] = deque(maxlen=KEPT_STEPS)  # with the time of their arrival

    @property
    def last_step(self) -> int:
        """The number of the latest step; -1 before the first."""
        return self._steps[-1][1].sequence if self._steps else -1

    def steps_after(self, sequence: int) -> list[StepReport]:
        """The steps with higher numbers, `started` in seconds after now."""
        now = time.monotonic()
        return [
            structs.replace(step, started=arrived - step.seconds - now)
            for arrived, step in self._steps
            if step.sequence > sequence
        ]

    def families(self) -> list[Metric]:
        """The current values of the engine's metrics and its requests'."""
        return self._metrics.engine_families()

    def repeat(self) -> None:
        """Set Ray's gauges again: it drops those that are not set for some time. To be called every few seconds."""
        self._ray.set_gauges()

    def on_ready(self, info: Ready) -> None:
        """The engine is up."""
        self._ray.is_up = True
        super().on_ready(info)

    def on_step(self, state: EngineState, step: StepReport | None) -> None:
        """A step ran, or the state changed without one."""
        super().on_step(state, step)
        self._ray.take(state, step)
        if step is not None:
            self._steps.append((time.monotonic(), step))

    def on_first_token(self, record: RequestRecord) -> None:
        """A request's first token has arrived."""
        super().on_first_token(record)
        assert record.first_token_time is not None
        self._ray.first_token.observe(record.first_token_time - record.arrival_time)

    def on_tokens(self, record: RequestRecord, seconds: float) -> None:
        """A sequence got another token."""
        super().on_tokens(record, seconds)
        self._ray.inter_token.observe(seconds)

    def on_finish(self, record: RequestRecord) -> None:
        """A request ended."""
        super().on_finish(record)
        _add(self._ray.generated, record.num_output_tokens)

    def on_dead(self, reason: str) -> None:
        """The engine is dead."""
        self._ray.is_up = False
        super().on_dead(reason)


class _RayMetrics:
    """What every node of the cluster exports."""

    def __init__(self) -> None:
        self.running = Gauge(PREFIX + "num_requests_running", "Requests in the running batch.")
        self.waiting = Gauge(PREFIX + "num_requests_waiting", "Requests that wait.")
        self.usage = Gauge(PREFIX + "kv_cache_usage_perc", "Used share of the cache, 0 to 1.")
        self.up = Gauge(PREFIX + "engine_up", "1 while the engine is alive.")
        self.queries = Counter(PREFIX + "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.hits = Counter(PREFIX + "prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = Counter(PREFIX + "num_preemptions", "Requests put back to wait for lack of blocks.")
        self.steps = Counter(PREFIX + "steps", "Engine steps.", tag_keys=("mode",))
        self.tokens = Counter(PREFIX + "tokens", "Tokens computed in steps.", tag_keys=("mode",))
        self.generated = Counter(PREFIX + "generation_tokens", "Output tokens.")
        self.first_token = Histogram(
            PREFIX + "time_to_first_token_seconds", "Seconds to the first token.", list(FIRST_TOKEN_BUCKETS)
        )
        self.inter_token = Histogram(
            PREFIX + "inter_token_latency_seconds", "Seconds between tokens.", list(INTER_TOKEN_BUCKETS)
        )
        self.is_up = False
        self._state: EngineState | None = None

    def take(self, state: EngineState, step: StepReport | None) -> None:
        """The load, and what a step did."""
        for counter, name in (
            (self.queries, "prefix_cache_queries"),
            (self.hits, "prefix_cache_hits"),
            (self.preemptions, "num_preemptions"),
        ):
            _add(counter, getattr(state, name) - (0 if self._state is None else getattr(self._state, name)))
        self._state = state
        self.set_gauges()
        if step is not None:
            tags = {"mode": str(Mode(*step.mode))}
            self.steps.inc(1, tags)
            _add(self.tokens, step.num_tokens, tags)

    def set_gauges(self) -> None:
        """The current load."""
        self.up.set(self.is_up)
        if self._state is not None:
            self.running.set(self._state.num_running)
            self.waiting.set(self._state.num_waiting)
            self.usage.set(self._state.kv_cache_usage)


def _add(counter: Counter, amount: int, tags: dict[str, str] | None = None) -> None:
    """Ray's counters refuse an increment of 0."""
    if amount > 0:
        counter.inc(amount, tags)
