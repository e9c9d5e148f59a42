"""Prometheus metrics of the stages of requests."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Histogram

from ulysses_infer.server.client import RequestRecord
from ulysses_infer.server.observe.engine_registry import EngineRegistry

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
TOKEN_BUCKETS = tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5))


class RequestMetrics:
    """The stages of a request: arrival, first step, first token, last token, end."""

    def __init__(self, metrics: EngineRegistry) -> None:
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
        """The first token of a request came."""
        assert record.first_token_time is not None
        self.prompt_tokens.inc(record.num_prompt_tokens)
        self.first_token.observe(record.first_token_time - record.arrival_time)

    def end(self, record: RequestRecord) -> None:
        """A request ended."""
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
