"""Prometheus' text format of metrics that several processes have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import Metric, generate_latest
from prometheus_client.registry import Collector


class _Families(Collector):
    """What is there already, as the library's function wants it."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """The families."""
        yield from self._families


def exposition(parts: Iterable[Iterable[Metric]]) -> bytes:
    """The text of all families. Those of one name become one, as the format requires, with the samples of all.

    Samples of different parts must differ in a label.
    """
    merged: dict[str, Metric] = {}
    for family in (family for part in parts for family in part):
        known = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
        known.samples += family.samples
    return generate_latest(_Families(merged.values()))
