"""Prometheus metrics of one engine: all have its labels, whose values are bound once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

PREFIX = "ulysses:"


class EngineRegistry:
    """Makes metrics, and holds them. labels: those of every metric, such as the model's name; their values are bound
    once, because tokens arrive by the thousands."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        self._labels = dict(labels)

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
