"""The engine of rank 0: takes requests, runs steps, gives results. The other ranks follow its plans."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.cache.prefix import prefix_salt
from ulysses_infer.config import Config, PolicyConfig
from ulysses_infer.engine.batch import Batch, ScheduledRequest, make_plan
from ulysses_infer.engine.calibration import Calibration
from ulysses_infer.engine.completion import Completion, Sequence
from ulysses_infer.engine.expert_load import expert_load
from ulysses_infer.engine.in_flight import MAX_ASYNC_TOKENS, InFlightStep
from ulysses_infer.engine.policies import AdaptivePolicy, Decision, Policy, make_policy
from ulysses_infer.engine.policies.start import keep_profile, start_policy
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.results import StepResults
from ulysses_infer.engine.scheduler import Scheduler
from ulysses_infer.engine.sleep import SleepState
from ulysses_infer.engine.stats import StepRecord, StepStats
from ulysses_infer.errors import RequestError
from ulysses_infer.model.sampling.sampler import SamplingRow, derive_seed, needs_full_logits, reads_outputs
from ulysses_infer.outputs import CONSTRAINTS
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.text.detokenizer import Detokenizer
from ulysses_infer.text.prompts import PromptReader
from ulysses_infer.worker.channel import STEP
from ulysses_infer.worker.rank import Rank
from ulysses_infer.worker.step_plan import StepPlan

logger = logging.getLogger(__name__)
FORCED = "set from outside the policy"


class Engine:
    """Continuous batching over one replica. Not thread-safe; one caller drives `step`."""

    def __init__(self, config: Config, rank: Rank, prompts: PromptReader, text: bool = True) -> None:
        """`text`: whether outputs carry text; without it only stop strings are looked for."""
        self.config, self.worker, self.channel, self.prompts = config, rank.worker, rank.channel, prompts
        self._rank = rank
        self._decoder = prompts.decoder if text else None
        cache = rank.worker.cache
        allocator = BlockPools(
            cache.blocks_of_groups,
            cache.shape.block_size,
            config.cache.enable_prefix_caching,
            cache.groups.attention_spans,
        )
        self.scheduler = Scheduler(config.scheduler, allocator, rank.worker.model.shape.max_model_len)
        self.policy: Policy = self._make_policy(config.policy)
        self.stats = StepStats()
        self.sleep = SleepState()
        self._completions: dict[str, Completion] = {}
        self._owners: dict[int, tuple[Completion, Sequence]] = {}
        self._row_readers: set[int] = set()  # requests for which the best token of a row is not enough
        self._output_readers: set[int] = set()  # requests whose next token cannot be chosen before the last is here
        self._dropped: list[int] = []
        self._is_async = bool(config.scheduler.async_scheduling)
        self._in_flight: InFlightStep | None = None
        self._last_completed = 0.0
        self._indices, self._names, self._sequence = itertools.count(), itertools.count(), itertools.count()
        self.choose_mode: Callable[[Batch], Mode] | None = None
        """Overrides the policy; for tests and tools that drive the modes themselves."""

    # -- the main loop -----------------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished

    def step(self) -> list[Completion]:
        """Run one step; returns the requests that got a token or ended in it.

        The step after it may be on its way already (`scheduler.async_scheduling`): see `InFlightStep`.
        """
        step = self._in_flight or self._launch()
        if step is None:
            return []
        self._in_flight = self._launch(step) if step.may_be_followed else None
        return self._complete(step)

    def _launch(self, before: InFlightStep | None = None) -> InFlightStep | None:
        """Schedule a step, tell the other ranks and ask this one's device for its share; None: there is nothing to do.

        `before`: the step that is still on its way.
        """
        scheduler = self.scheduler
        limit = self.policy.prefill_limit(scheduler.running, scheduler.next_waiting)
        batch = scheduler.schedule(limit, ahead=before is not None)
        self._dropped += [request.index for request in batch.preempted]
        if batch.is_empty:
            return None
        decision = self._decide(batch)
        plan = self._plan(batch, decision.mode, before)
        started = time.perf_counter()
        self.channel.send(STEP, plan.encode())
        results = StepResults(batch, plan.items, self._owners, self._decoder)
        arrival = self.worker.run(plan, results.choose)
        return InFlightStep(batch, plan, decision, results, arrival, started)

    def _complete(self, step: InFlightStep) -> list[Completion]:
        """Wait for a step's tokens and give them to their requests; returns whom they touched."""
        step.complete()
        self._record(step)
        living = [item for item in step.batch.scheduled if not item.request.is_finished]
        self._end_impossible(step.results)
        self.scheduler.update(step.batch, step.results.tokens)
        return self._collect(living, step.results)

    def _decide(self, batch: Batch) -> Decision:
        if self.choose_mode is not None:
            return Decision(self.choose_mode(batch), FORCED)
        return self.policy.decide(batch)

    def _record(self, step: InFlightStep) -> None:
        plan, batch, decision = step.plan, step.batch, step.decision
        now = time.perf_counter()
        seconds, self._last_completed = now - max(step.started, self._last_completed), now
        record = StepRecord(plan.sequence, plan.mode, plan.num_tokens, batch.num_decodes, seconds, decision)
        self.stats.record(record)
        # A GPU is only known to be done when a row of logits has come back from it.
        if decision.reason != FORCED and (self.worker.device.type == "cpu" or any(i.samples for i in batch.scheduled)):
            self.policy.observe(batch, decision, seconds)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", record.explain())

    def _plan(self, batch: Batch, mode: Mode, before: InFlightStep | None) -> StepPlan:
        dropped, self._dropped = self._dropped, []
        full = bool(self._row_readers) and any(i.request.index in self._row_readers for i in batch.scheduled)
        keeps_tokens = self._is_async and batch.num_tokens <= MAX_ASYNC_TOKENS and not self._output_readers
        rows_before = None if before is None else before.results.rows_of_requests
        return make_plan(next(self._sequence), mode, batch, dropped, full, keeps_tokens, rows_before)

    def _end_impossible(self, results: StepResults) -> None:
        """A row whose constraints leave no token ends that request alone: well, if its grammar is complete."""
        for index in [index for index, token in results.tokens.items() if token < 0]:
            completion, sequence = self._owners[index]
            sequence.detokenizer.finish()
            if sequence.row.may_end:
                self.scheduler.finish(sequence.request, "stop", sequence.detokenizer.stop_reason)
            else:
                logger.warning("request %s allows no token at all; ended with an error", completion.request_id)
                self.scheduler.finish(sequence.request, "error", CONSTRAINTS if sequence.row.is_constrained else None)

    def _collect(self, items: list[ScheduledRequest], results: StepResults) -> list[Completion]:
        """Give sampled tokens to their texts, end what a stop string ended; returns whom this step touched."""
        touched: dict[str, Completion] = {}
        for item in items:
            if not item.samples:
                continue
            completion, sequence = self._owners[item.request.index]
            touched[completion.request_id] = completion
            if results.tokens[item.request.index] >= 0 and item.request.finish_reason != "abort":
                stop = sequence.take_token()
                if stop is not None and item.request.stop_reason != stop:
                    self.scheduler.finish(item.request, "stop", stop)
            if item.request.is_finished:
                self._forget(sequence.request)
        for completion in touched.values():
            if completion.is_finished:
                del self._completions[completion.request_id]
        return list(touched.values())

    # -- requests ----------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
    ) -> str:
        """Queue a prompt (text, token ids, or chat messages); returns its request id.

        `adapter`: the name of a LoRA adapter for its tokens to go through, one of `lora.adapters`.
        Raises `RequestError`, and nothing is queued, if any part of it is invalid.
        """
        self.sleep.check_awake()
        arrival = time.monotonic()
        params = params.clone()
        params.validate_for(self.worker.model.shape.vocab_size)
        text, token_ids = self.prompts.read(prompt)
        name = request_id if request_id is not None else f"request-{next(self._names)}"
        if name in self._completions:
            raise RequestError(f"request id {name!r} is in use; use another")
        completion = Completion(name, text, token_ids, params)
        completion.prompt_logprobs = None if params.prompt_logprobs is None else [None]
        seed = self.prompts.seed(params)
        number = self._adapter_number(adapter)
        salt = prefix_salt(cache_salt, adapter)
        for index in range(params.n):
            self._add_sequence(completion, index, derive_seed(seed, index), arrival, priority, salt, number)
        self._completions[name] = completion
        return name

    def _add_sequence(
        self,
        completion: Completion,
        index: int,
        seed: int,
        arrival: float,
        priority: int,
        cache_salt: str,
        adapter: int,
    ) -> None:
        params, name = completion.params, completion.request_id
        request = Request(
            request_id=name if params.n == 1 else f"{name}#{index}",
            index=next(self._indices),
            prompt_token_ids=completion.prompt_token_ids,
            params=params,
            arrival_time=arrival,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
            eos_token_ids=self.prompts.eos_token_ids,
        )
        row = SamplingRow(
            params,
            seed,
            request.prompt_token_ids,
            request.output_token_ids,
            request.eos_token_ids,
            self.prompts.bad_words(params),
            self.prompts.grammar(params),
        )
        decoder = self.prompts.decoder if params.stop else self._decoder
        detokenizer = Detokenizer(decoder, params, request.prompt_token_ids)
        self.scheduler.add(request)
        sequence = Sequence(request, row, detokenizer)
        completion.sequences.append(sequence)
        self._owners[request.index] = completion, sequence
        if _reads_rows(params):
            self._row_readers.add(request.index)
        if reads_outputs(params):
            self._output_readers.add(request.index)

    def _adapter_number(self, name: str | None) -> int:
        if name is None:
            return 0
        names = list(self.config.lora.adapters)
        if name not in names:
            raise RequestError(f"adapter {name!r} is not loaded; loaded are: {', '.join(names) or 'none'}")
        return names.index(name) + 1

    def abort(self, request_id: str) -> Completion | None:
        """End a request in any state; returns what there is of it, or None if it is not known (any more)."""
        completion = self._completions.pop(request_id, None)
        if completion is None:
            return None
        for sequence in completion.sequences:
            if self.scheduler.abort(sequence.request.request_id) is not None:
                sequence.detokenizer.finish()
                self._forget(sequence.request)
        return completion

    def abort_all(self) -> list[Completion]:
        """End every request; returns what there is of each."""
        aborted = [self.abort(request_id) for request_id in list(self._completions)]
        return [completion for completion in aborted if completion is not None]

    def is_full(self, max_num_queued_requests: int) -> bool:
        """Whether so many sequences wait already, not counting those that the next step has a place for."""
        free_places = self.config.scheduler.max_num_seqs - self.scheduler.num_running
        return self.scheduler.num_waiting >= max_num_queued_requests + max(0, free_places)

    def _forget(self, request: Request) -> None:
        if self._owners.pop(request.index, None) is not None:
            self._dropped.append(request.index)
            self._row_readers.discard(request.index)
            self._output_readers.discard(request.index)
        if not self.has_unfinished:
            self._in_flight = None  # nobody waits for what it brings

    def warm_up(self) -> None:
        """Run a prefill and a decode in every mode: proof that all ranks can, before anyone waits for it."""
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
        for mode in self.config.parallel.available_modes:
            self.choose_mode = lambda batch, mode=mode: mode
            self.add([0] * min(self.config.parallel.world_size + 1, self.scheduler.max_model_len - 2), params)
            while self.has_unfinished:
                self.step()
        self.choose_mode = None
        self.scheduler.allocator.reset_prefix_cache()
        self.stats = StepStats()

    def take_collective_seconds(self) -> dict[str, float]:
        """Seconds rank 0 spent in each kind of collective since the last call."""
        return self.worker.groups.clock.take()

    # -- policy and statistics ---------------------------------------------------------------------------------

    def set_policy(self, settings: PolicyConfig) -> None:
        """Swap the policy; the next step is the first it decides. Raises `ConfigError`."""
        self.policy = self._make_policy(settings)
        self.prepare_policy()

    def _make_policy(self, settings: PolicyConfig) -> Policy:
        parallel = self.config.parallel
        policy = make_policy(settings, parallel.available_modes, parallel.base, parallel.layout.shift)
        if isinstance(policy, AdaptivePolicy):
            start_policy(policy, self.worker)
        return policy

    def prepare_policy(self) -> None:
        """Have a policy that knows no step times measure them, unless requests run: then it learns from those."""
        policy = self.policy
        if isinstance(policy, AdaptivePolicy) and policy.wants_calibration and not self.has_unfinished:
            profile = self.calibrate(policy.config.calibration_seconds)
            policy.learn(profile, f"measured in {profile.notes['seconds']:g} s")
            keep_profile(profile, policy.config)

    def calibrate(self, seconds: float) -> Profile:
        """Measure step times for about `seconds`, in every mode. Raises `RequestError` while requests run."""
        with self.calibration() as calibration:
            return calibration.run(seconds)

    @contextmanager
    def calibration(self) -> Iterator[Calibration]:
        """What runs steps that no request asked for. Raises `RequestError` while requests run."""
        self.check_idle("calibrating")
        self.sleep.check_awake()
        modes = self.config.parallel.available_modes
        calibration = Calibration(
            self.worker, self.channel, self.scheduler.allocator, self.config.scheduler, modes, self._dropped
        )
        yield calibration
        self._dropped = calibration.dropped

    def check_idle(self, doing: str) -> None:
        """Raise `RequestError` while requests run or wait."""
        if self.has_unfinished:
            raise RequestError(
                f"{doing} has to wait: {self.scheduler.num_running} requests are running and "
                f"{self.scheduler.num_waiting} waiting; let them end, or abort them"
            )

    def weights_changed(self) -> None:
        """What the cache holds came from other weights: forget it."""
        self.sleep.lacks_weights = False
        self.scheduler.allocator.reset_prefix_cache()

    def fall_asleep(self, level: int) -> None:
        """Take no requests until `woken_up`, and forget what the cache holds. Raises `RequestError`."""
        self.check_idle("sleep")
        self.sleep.deepen(level)
        self.scheduler.allocator.reset_prefix_cache()

    def woken_up(self) -> None:
        """Take requests again."""
        self.sleep.level = 0

    def explain(self, step: int | None = None) -> str:
        """Why a step, by default the latest, ran in its mode, in one line. Raises `RequestError` for an unknown one."""
        return self.stats.find(step).explain()

    def expert_load(self) -> dict[str, Any]:
        """Where the experts are and how many tokens those of each rank have computed; {} without any."""
        return expert_load(self._rank)

    def describe(self) -> dict[str, Any]:
        """Counters per mode, queue lengths, cache use, the policy and the load of experts, as plain values."""
        allocator = self.scheduler.allocator
        return {
            **self.stats.as_dict(),
            **self.expert_load(),
            "policy": self.policy.describe(),
            "policy_stats": self.policy.stats(),
            "num_requests_running": self.scheduler.num_running,
            "num_requests_waiting": self.scheduler.num_waiting,
            "kv_cache_usage_perc": allocator.usage,
            "num_blocks": allocator.num_blocks,
            "prefix_cache_queries": allocator.prefix_stats.queries,
            "prefix_cache_hits": allocator.prefix_stats.hits,
            "num_preemptions": self.scheduler.num_preemptions,
        }


def _reads_rows(params: SamplingParams) -> bool:
    """Whether rank 0 needs this request's whole rows of logits."""
    return needs_full_logits(params) or params.logprobs is not None or params.prompt_logprobs is not None
