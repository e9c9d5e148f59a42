"""Prometheus metrics with vLLM's suffixes, and those of modes and switches."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.server.client import RequestRecord
from ulysses_infer.server.messages import EngineState, StepReport
from ulysses_infer.server.observe.engine_metrics import EngineMetrics
from ulysses_infer.server.observe.engine_registry import PREFIX, EngineRegistry
from ulysses_infer.server.observe.exposition import exposition
from ulysses_infer.server.observe.request_metrics import RequestMetrics

HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The metrics of one server in registries of their own. labels: those of every metric of the engine, such as the
    model's name; their values are bound once, because tokens arrive by the thousands."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._made = made = EngineRegistry(labels)
        self._requests, self._engine = RequestMetrics(made), EngineMetrics(made)
        self._modes: dict[tuple[int, int], _ModeMetrics] = {}
        self._last_mode: _ModeMetrics | None = None
        self._steps = made.counter("steps", "Engine steps.", "mode")
        self._tokens = made.counter("tokens", "Tokens computed in steps, of prompts and outputs.", "mode")
        self._step_seconds = made.histogram("step_seconds", "Seconds a step took.", STEP_BUCKETS, "mode")
        self._switches = made.counter("mode_switches", "Steps in another mode than the step before.", "from", "to")
        self._collectives = made.counter(
            "collective_seconds", "Seconds rank 0 spent in collectives, waiting included.", "op", "mode"
        )
        self._http = _HttpMetrics()

    def engine_families(self) -> list[Metric]:
        """The current values of the engine's metrics and its requests'."""
        return list(self._made.registry.collect())

    def http_families(self) -> list[Metric]:
        """The current values of the HTTP metrics."""
        return list(self._http.registry.collect())

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return exposition([self.engine_families(), self.http_families()])

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
            self._made.child(self._collectives, name, mode.name).inc(seconds)
        if self._last_mode is not None and self._last_mode is not mode:
            self._made.child(self._switches, self._last_mode.name, mode.name).inc()
        self._last_mode = mode

    def _mode_metrics(self, mode: tuple[int, int]) -> _ModeMetrics:
        name = str(Mode(*mode))
        children = (self._made.child(metric, name) for metric in (self._steps, self._tokens, self._step_seconds))
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
