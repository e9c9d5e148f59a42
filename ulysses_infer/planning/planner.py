"""Evaluates every layout that fits under every policy, and picks the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ulysses_infer.bench.serve.traces import HASH_BLOCK_TOKENS, TraceRow
from ulysses_infer.cache.offload_sizing import offload_sizes
from ulysses_infer.config import Config, PolicyConfig
from ulysses_infer.config.speculation import AUTO
from ulysses_infer.engine.calibration_points import Limits
from ulysses_infer.engine.policies import AdaptivePolicy, Policy, StaticPolicy, ThresholdPolicy
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.layouts import PlannedLayout, all_layouts
from ulysses_infer.planning.node import Node
from ulysses_infer.planning.operations import Changes, StepOperations
from ulysses_infer.planning.replica import ReplicaSettings, SimulatedReplica
from ulysses_infer.planning.results import Figures, figures_of
from ulysses_infer.planning.simulation import Fleet, simulate
from ulysses_infer.planning.sizes import ModelSizes
from ulysses_infer.planning.speculation import AssumedSpeculation, SimulatedSpeculation
from ulysses_infer.planning.step_times import AnalyticStepTimes, MeasuredStepTimes, StepTimes, profile_of
from ulysses_infer.planning.tier import SimulatedTier
from ulysses_infer.planning.workload import check_lengths, check_size
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.step_time.step_shape import StepShape

MOST_TOKENS = 1 << 14
MOST_BATCHED = 8192  # tokens of a step, if the recipe does not say
DTYPES = ("bf16", "fp8_block", "fp8", "int4")  # by bytes per weight
Report = Callable[[str, float], None]
"""Called with what is simulated and the share, 0 to 1, that is done."""


@dataclass(frozen=True)
class Candidate:
    """A layout with a policy."""

    layout: PlannedLayout
    policy: str
    """static, threshold or adaptive."""
    mode: Mode | None = None
    """Of policy static."""
    threshold: int | None = None

    def __str__(self) -> str:
        detail = {"static": str(self.mode), "threshold": f"{self.threshold} tokens"}.get(self.policy, "")
        return f"{self.layout}, {self.policy} {detail}".rstrip()


@dataclass(frozen=True)
class Evaluation:
    """A candidate and its figures; `replica` is the first of the simulated ones, for its timeline."""

    candidate: Candidate
    figures: Figures
    replica: SimulatedReplica


@dataclass(frozen=True)
class Plan:
    """The result of planning."""

    sizes: ModelSizes
    node: Node
    num_nodes: int
    rows: Sequence[TraceRow]
    layouts: list[PlannedLayout]
    evaluations: list[Evaluation]
    """Best first."""
    targets: Mapping[str, float]
    crossovers: Mapping[str, int | None]
    """By layout: the number of prompt tokens from which its base mode is faster than full tensor parallelism."""
    speculation: AssumedSpeculation | None = None

    @property
    def has_tier(self) -> bool:
        """Whether host memory and disk keep evicted prefixes."""
        return any(layout.tier for layout in self.layouts)

    @property
    def best(self) -> Evaluation:
        """The recommended one."""
        return self.evaluations[0]

    @property
    def pareto(self) -> list[Evaluation]:
        """Those that no other beats in both median time to first token and median time per token."""
        return [one for one in self.evaluations if not any(_dominates(other, one) for other in self.evaluations)]

    def cost(self, evaluation: Evaluation, price: float) -> float:
        """Of a million tokens. price: of one device for an hour."""
        hourly = price * self.num_nodes * self.node.num_devices
        return hourly / 3600 / max(evaluation.figures.tokens_per_second, 1e-9) * 1e6


class Planner:
    """Plans one model on one kind of node."""

    def __init__(
        self,
        sizes: ModelSizes,
        node: Node,
        config: Config,
        num_nodes: int = 1,
        changes: Changes | None = None,
        profile: Profile | None = None,
        tokens_per_hash: float = HASH_BLOCK_TOKENS,
        speculation: AssumedSpeculation | None = None,
    ) -> None:
        """profile: measured step times instead of predicted ones; its modes decide which layouts are simulated.

        Raises `ConfigError` for speculation with a model that the engine does not speculate with, and for a tier below
        the cache that cannot be planned.
        """
        if speculation is not None:
            self._check_speculation(speculation, sizes, config)
        self._check_tier(sizes, node, config)
        self.sizes, self.node, self.config, self.num_nodes = sizes, node, config, num_nodes
        self.changes, self.profile, self.speculation = changes or Changes(), profile, speculation
        self.tokens_per_hash = tokens_per_hash
        self.max_model_len = min(config.model.max_model_len or sizes.max_model_len, sizes.max_model_len)
        self.layouts = all_layouts(sizes, node, config, num_nodes)

    @staticmethod
    def _check_speculation(speculation: AssumedSpeculation, sizes: ModelSizes, config: Config) -> None:
        if sizes.num_recurrent_layers:
            raise ConfigError(
                f"--speculation: model type {sizes.model_type!r} has recurrent layers, whose states cannot go back to "
                "the accepted tokens; leave it out"
            )
        count, most = speculation.config.num_tokens, config.scheduler.max_num_batched_tokens or MOST_BATCHED
        if count != AUTO and count >= most:
            raise ConfigError(
                f"--speculation: num_tokens={count} must be less than --max-num-batched-tokens {most}, the limit of "
                "a step"
            )

    @staticmethod
    def _check_tier(sizes: ModelSizes, node: Node, config: Config) -> None:
        if not config.cache.offload_host_bytes:
            return
        if node.host_link is None:
            raise ConfigError(f"hardware {node.name} has no host_link, which a tier below the cache needs; add it")
        if sizes.num_recurrent_layers:
            raise ConfigError(
                f"cache.offload_host_bytes: model type {sizes.model_type!r} has recurrent layers, and snapshots of "
                "their states are not planned; leave it out"
            )

    def plan(self, rows: Sequence[TraceRow], targets: Mapping[str, float], report: Report | None = None) -> Plan:
        """Simulate every candidate. targets: limits in ms by metric. Raises `ConfigError` if no layout fits."""
        candidates = list(self._candidates())
        if not candidates:
            raise ConfigError(self._why_nothing_fits())
        fitting = check_lengths(rows, self.max_model_len)
        check_size(fitting, len(candidates), min(self.config.cache.block_size, self._most_batched))
        evaluations = []
        for number, candidate in enumerate(candidates):
            progress = partial(_report, report, str(candidate), number, len(candidates))
            progress(0.0)
            evaluations.append(self.evaluate(candidate, fitting, targets, progress))
        evaluations.sort(key=lambda evaluation: _cost(evaluation.figures, bool(targets)))
        crossovers = {str(layout): self.crossover(layout) for layout in self.usable}
        return Plan(
            self.sizes,
            self.node,
            self.num_nodes,
            fitting,
            self.layouts,
            evaluations,
            targets,
            crossovers,
            self.speculation,
        )

    @property
    def _most_batched(self) -> int:
        return self.config.scheduler.max_num_batched_tokens or MOST_BATCHED

    @property
    def usable(self) -> list[PlannedLayout]:
        """Layouts that are legal and fit, and for which there are step times."""
        fitting = [layout for layout in self.layouts if layout.reason is None]
        if self.profile is None:
            return fitting
        measured = {measurement.mode for measurement in self.profile.measurements}
        return [layout for layout in fitting if set(layout.modes) <= measured]

    def _candidates(self) -> Iterator[Candidate]:
        for layout in self.usable:
            yield Candidate(layout, "static", layout.base)
            if len(layout.modes) > 1:
                yield Candidate(layout, "threshold", threshold=self.crossover(layout) or MOST_TOKENS)
                yield Candidate(layout, "adaptive")

    def evaluate(
        self,
        candidate: Candidate,
        rows: Sequence[TraceRow],
        targets: Mapping[str, float],
        report: Callable[[float], None] | None = None,
    ) -> Evaluation:
        """Simulate one candidate. report: called with the share, 0 to 1, that is done."""
        times = self.times(candidate.layout)
        settings = self.settings(candidate.layout)

        def replica() -> SimulatedReplica:
            policy = self.policy(candidate, times)
            return SimulatedReplica(settings, times, policy, self._speculation_of(candidate.layout, policy, times))

        fleet = Fleet(candidate.layout.dp, replica)
        result = simulate(rows, fleet, times.request_seconds, report=report)
        return Evaluation(candidate, figures_of(result, fleet.replicas, targets), fleet.replicas[0])

    def times(self, layout: PlannedLayout) -> StepTimes:
        """Step times of a layout."""
        if self.profile is not None:
            return MeasuredStepTimes(self.profile, self.node.host)
        operations = StepOperations(self.sizes, self.node, layout.placement, self.changes, self.num_nodes)
        return AnalyticStepTimes(operations, layout.modes)

    def crossover(self, layout: PlannedLayout) -> int | None:
        """The least number of prompt tokens from which the base mode stays faster than full TP; None if none is."""
        times, (base, *shift) = self.times(layout), layout.modes
        if not shift:
            return None
        counts = sorted({round(2 ** (step / 16)) for step in range(16 * MOST_TOKENS.bit_length())})
        slower = [
            count for count in counts if count <= MOST_TOKENS and not self._is_faster(times, base, shift[0], count)
        ]
        return None if slower and slower[-1] >= MOST_TOKENS // 2 else (slower[-1] if slower else 0)

    @staticmethod
    def _is_faster(times: StepTimes, base: Mode, shift: Mode, tokens: int) -> bool:
        shape = StepShape.of([], [(0, tokens)])
        return times.seconds(base, shape) < times.seconds(shift, shape)

    def settings(self, layout: PlannedLayout) -> ReplicaSettings:
        """What each replica of a layout is made of."""
        scheduler, cache = self.config.scheduler, self.config.cache
        num_sequences = layout.num_sequences(scheduler.max_num_seqs)
        usable = min(layout.cache_tokens(num_sequences), num_sequences * self.max_model_len)
        num_blocks = max(1, usable // cache.block_size)
        return ReplicaSettings(
            scheduler=replace(scheduler, max_num_seqs=num_sequences),
            num_blocks=num_blocks,
            block_size=cache.block_size,
            max_model_len=self.max_model_len,
            enable_prefix_caching=cache.enable_prefix_caching,
            tokens_per_hash=self.tokens_per_hash,
            make_tier=self._tier(layout, num_blocks) if layout.tier else None,
        )

    def _tier(self, layout: PlannedLayout, num_blocks: int) -> Callable[[], SimulatedTier]:
        """Makes the tier below the cache of a replica. Raises `ConfigError` if it holds less than a block."""
        assert self.node.host_link is not None
        block_bytes = int(layout.token_bytes * self.config.cache.block_size)
        slots = offload_sizes(self.config.cache, [block_bytes], [num_blocks])
        return partial(SimulatedTier, slots, self.node.host_link, layout.base.world_size)

    def policy(self, candidate: Candidate, times: StepTimes) -> Policy:
        """A new policy of a candidate."""
        layout = candidate.layout
        if candidate.policy == "static":
            assert candidate.mode is not None
            return StaticPolicy(candidate.mode)
        if candidate.policy == "threshold":
            assert candidate.threshold is not None
            return ThresholdPolicy(layout.base, layout.layout.shift, candidate.threshold)
        policy = AdaptivePolicy(layout.modes, PolicyConfig(name="adaptive"))
        policy.learn(profile_of(times, self._limits(layout)), "predicted step times")
        return policy

    def _speculation_of(self, layout: PlannedLayout, policy: Policy, times: StepTimes) -> SimulatedSpeculation | None:
        if self.speculation is None:
            return None
        predicted = profile_of(times, self._limits(layout)).measurements
        return SimulatedSpeculation(self.speculation, policy, times.modes, predicted, self._most_batched)

    def _limits(self, layout: PlannedLayout) -> Limits:
        scheduler = self.config.scheduler
        cached = layout.cache_tokens(scheduler.max_num_seqs)
        return Limits(self._most_batched, scheduler.max_num_seqs, self.max_model_len, cached)

    def _why_nothing_fits(self) -> str:
        if self.profile is not None and any(layout.reason is None for layout in self.layouts):
            measured = ", ".join(dict.fromkeys(str(each.mode) for each in self.profile.measurements))
            return f"the profile has modes {measured}, which no layout of {self.node.name} consists of; calibrate there"
        fullest = max(self.layouts, key=lambda layout: layout.base.world_size * layout.base.tp)
        node = f"{self.num_nodes * self.node.num_devices} x {self.node.device}"
        remedies = self._remedies()
        return (
            f"no layout of {self.sizes.model_type} fits on {node}; the smallest per device is {fullest}: "
            f"{fullest.reason}. {f'It fits with {remedies}' if remedies else 'Take larger devices'}"
        )

    def _remedies(self) -> str:
        """What would make the model fit: shorter requests, a smaller dtype, or more devices in a node."""
        longest = max(layout.cache_tokens(1) for layout in self.layouts)
        found = [f"--max-model-len {longest}"] if longest > 0 else []
        for dtype in DTYPES[DTYPES.index(self.sizes.dtype) + 1 :]:
            if self._fits(replace(self.sizes, dtype=dtype), self.node):
                found.append(f"--dtype {dtype}")
                break
        for factor in (2, 4, 8, 16):
            count = factor * self.node.num_devices
            if self._fits(self.sizes, replace(self.node, num_devices=count)):
                found.append(f"nodes of {count} such devices")
                break
        return " or ".join(found)

    def _fits(self, sizes: ModelSizes, node: Node) -> bool:
        return any(layout.reason is None for layout in all_layouts(sizes, node, self.config))


def _report(report: Report | None, name: str, number: int, count: int, share: float) -> None:
    """Report that `share` of candidate `number` of `count` is done."""
    if report is not None:
        report(name, (number + share) / count)


def _cost(figures: Figures, has_targets: bool) -> tuple[float, ...]:
    """With targets: missed requests first. Then the mean latency of a request."""
    missed = 1 - figures.goodput if has_targets else 0.0
    return figures.num_refused, round(missed, 4), figures.latency.mean


def _dominates(one: Evaluation, other: Evaluation) -> bool:
    mine = one.figures.ttft.p50, one.figures.tpot.p50
    others = other.figures.ttft.p50, other.figures.tpot.p50
    return all(a <= b for a, b in zip(mine, others, strict=True)) and mine != others
