"""A replica in virtual time: the engine's scheduler, block pools and policy, with steps that only take time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ulysses_infer.bench.serve.traces import HASH_BLOCK_TOKENS, TraceRow
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.load import outstanding_tokens
from ulysses_infer.engine.policies import Decision, Policy
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.scheduler import NO_DRAFTS, Scheduler
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.speculation import SimulatedSpeculation
from ulysses_infer.planning.step_times import StepTimes
from ulysses_infer.planning.tier import SimulatedTier
from ulysses_infer.planning.workload import prompt_hashes
from ulysses_infer.sampling_params import SamplingParams

TOKEN = 0  # what every sampled token is


@dataclass(frozen=True)
class ReplicaSettings:
    """What one replica is made of."""

    scheduler: SchedulerConfig
    num_blocks: int
    block_size: int
    max_model_len: int
    enable_prefix_caching: bool = True
    tokens_per_hash: float = HASH_BLOCK_TOKENS
    """Prompt tokens per hash id of the trace."""
    make_tier: Callable[[], SimulatedTier] | None = None
    """Makes the tier below the cache; None: evicted blocks are lost."""


class SimulatedReplica:
    """Steps one after another, each as long as `times` says. `now` is virtual, in seconds."""

    def __init__(
        self,
        settings: ReplicaSettings,
        times: StepTimes,
        policy: Policy,
        speculation: SimulatedSpeculation | None = None,
    ) -> None:
        self.settings, self.times, self.policy, self.speculation = settings, times, policy, speculation
        self.now = 0.0
        self.tier = None if settings.make_tier is None else settings.make_tier()
        index = None if self.tier is None else self.tier.index
        pools = BlockPools([settings.num_blocks], settings.block_size, settings.enable_prefix_caching, tier=index)
        self.scheduler = Scheduler(settings.scheduler, pools, settings.max_model_len, clock=lambda: self.now)
        self.timeline: list[tuple[float, float, Mode, int]] = []
        """(start, seconds, mode, batched tokens) of every step."""
        self._step: tuple[Batch, Decision, float] | None = None
        self._sampled: dict[int, int] = defaultdict(lambda: TOKEN)
        self._outstanding = 0

    @property
    def is_busy(self) -> bool:
        """Whether a step runs."""
        return self._step is not None

    @property
    def load(self) -> tuple[int, float]:
        """What the server's router compares: outstanding work, then the used share of the cache."""
        return self._outstanding, self.scheduler.allocator.usage

    def submit(self, row: TraceRow, index: int, now: float, arrived: float) -> Request:
        """Queue a request that was sent at `arrived`. Raises `RequestError` if it can never run."""
        self.now = now
        request = Request(str(index), index, [TOKEN] * row.input_len, _params(row.output_len), arrived)
        settings = self.settings
        if settings.enable_prefix_caching:
            request.block_hashes = prompt_hashes(row, index, settings.block_size, settings.tokens_per_hash)
        self.scheduler.add(request)
        self._outstanding += outstanding_tokens([(1, request.num_prompt_tokens)])
        return request

    def start(self, now: float) -> float | None:
        """Start a step; returns when it ends, or None if there is nothing to run."""
        self.now = now
        running, waiting = self.scheduler.running, self.scheduler.next_waiting
        limit = self.policy.prefill_limit(running, waiting)
        drafts = NO_DRAFTS if self.speculation is None else self.speculation.draft(running, waiting)
        batch = self.scheduler.schedule(limit, drafts=drafts)
        if batch.is_empty:
            return None
        decision = self.policy.decide(batch)
        is_ahead = self.speculation is None or not self.speculation.is_due(batch)
        seconds = self.times.seconds(decision.mode, batch.shape, is_ahead)
        if self.tier is not None:
            seconds += self.tier.wait(self.scheduler.allocator.take_moves(), now)
        self._step = batch, decision, seconds
        self.timeline.append((now, seconds, decision.mode, batch.num_tokens))
        return now + seconds

    def finish(self, now: float) -> list[Request]:
        """End the running step at `now`; returns the requests that end with it."""
        assert self._step is not None
        self.now = now
        batch, decision, seconds = self._step
        self._step = None
        self.policy.observe(batch, decision, seconds)
        prompts = [item.request for item in batch.chunks if item.samples and item.request.first_token_time is None]
        if self.speculation is None:
            finished = self.scheduler.update(batch, self._sampled)
        else:
            accepted = self.speculation.accept(batch, decision.mode, seconds)
            finished = self.scheduler.update(batch, self._sampled, accepted)
            self.speculation.observe(batch, accepted, finished)
        self._outstanding -= outstanding_tokens([(0, request.num_prompt_tokens) for request in prompts])
        self._outstanding -= outstanding_tokens([(1, 0)] * len(finished))
        return finished


@lru_cache(maxsize=4096)  # checking parameters takes a tenth of a millisecond, and many requests have the same
def _params(output_len: int) -> SamplingParams:
    return SamplingParams(max_tokens=output_len, ignore_eos=True)
