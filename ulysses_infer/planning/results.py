"""Figures of a simulation, as benchmarks report them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ulysses_infer.bench.serve.result import percentile
from ulysses_infer.planning.replica import SimulatedReplica
from ulysses_infer.planning.simulation import RequestResult, SimulationResult


class Spread(NamedTuple):
    """Mean, median and 99th percentile."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Figures:
    """Latencies in milliseconds, throughputs per second."""

    ttft: Spread
    tpot: Spread
    latency: Spread
    tokens_per_second: float
    """Prompt and output tokens."""
    output_per_second: float
    goodput: float
    """Share of requests that meet every target; 1 without targets."""
    mode_shares: Mapping[str, float]
    """Share of steps by mode."""
    num_requests: int
    num_refused: int
    num_preemptions: int
    cached_share: float
    """Prompt tokens found in the prefix cache, or in the tier below it."""
    loaded_share: float
    """Prompt tokens found in the tier below the cache."""
    seconds: float
    num_drafted: int
    num_accepted: int
    """Drafted tokens that were right; those beyond the end of an output count, too."""
    num_replicas: int
    """Replicas that got a request."""

    @property
    def accepted_share(self) -> float:
        """Of all drafted tokens; 0 without any."""
        return self.num_accepted / max(1, self.num_drafted)


def figures_of(result: SimulationResult, replicas: Sequence[SimulatedReplica], targets: Mapping[str, float]) -> Figures:
    """targets: limits in ms by metric: ttft, tpot, latency."""
    done = result.requests
    seconds = max(result.seconds, 1e-9)
    inputs, outputs = sum(r.input_len for r in done), sum(r.output_len for r in done)
    good = sum(_meets(r, targets) for r in done)
    drafted = [each.speculation.stats for each in replicas if each.speculation is not None]
    loaded = sum(each.tier.index.stats.hits for each in replicas if each.tier is not None)
    return Figures(
        ttft=_spread([r.ttft for r in done]),
        tpot=_spread([r.tpot for r in done]),
        latency=_spread([r.latency for r in done]),
        tokens_per_second=(inputs + outputs) / seconds,
        output_per_second=outputs / seconds,
        goodput=good / max(1, len(done) + result.num_refused),
        mode_shares=_shares(replicas),
        num_requests=len(done),
        num_refused=result.num_refused,
        num_preemptions=result.num_preemptions,
        cached_share=sum(r.cached_tokens for r in done) / max(1, inputs),
        loaded_share=loaded / max(1, inputs),
        seconds=result.seconds,
        num_drafted=sum(each.num_draft_tokens for each in drafted),
        num_accepted=sum(each.num_accepted_tokens for each in drafted),
        num_replicas=len(replicas),
    )


def _spread(values: list[float]) -> Spread:
    values = sorted(1e3 * value for value in values)
    mean = sum(values) / max(1, len(values))
    return Spread(mean, percentile(values, 50), percentile(values, 99))


def _meets(result: RequestResult, targets: Mapping[str, float]) -> bool:
    return all(1e3 * getattr(result, name) <= limit for name, limit in targets.items())


def _shares(replicas: Sequence[SimulatedReplica]) -> dict[str, float]:
    steps = Counter(mode for replica in replicas for _, _, mode, _ in replica.timeline)
    return {str(mode): count / steps.total() for mode, count in steps.items()}
