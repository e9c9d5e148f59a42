"""The engine of rank 0: schedule, choose the mode, run, update. The other ranks follow its step plans."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ulysses_infer.cache.offload import OffloadTier
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.cache.snapshots import SnapshotPool
from ulysses_infer.config import Config
from ulysses_infer.engine.batch import Batch, ScheduledRequest, make_plan
from ulysses_infer.engine.completion import Completion
from ulysses_infer.engine.completion import Sequence as OutputSequence
from ulysses_infer.engine.in_flight import MAX_ASYNC_TOKENS, InFlightStep
from ulysses_infer.engine.policies import Decision
from ulysses_infer.engine.policy_control import PolicyControl
from ulysses_infer.engine.requests import RequestTable
from ulysses_infer.engine.results import StepResults
from ulysses_infer.engine.scheduler import Scheduler
from ulysses_infer.engine.sleep import SleepState
from ulysses_infer.engine.speculation.start import start_speculation
from ulysses_infer.engine.stats import StepRecord, StepStats
from ulysses_infer.errors import kind_and_line
from ulysses_infer.outputs import CONSTRAINTS, FAILED
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.text.prompts import PromptReader
from ulysses_infer.worker.channel import STEP
from ulysses_infer.worker.rank import Rank
from ulysses_infer.worker.step_plan import StepPlan

logger = logging.getLogger(__name__)
FORCED = "set from outside the policy"


class Engine:
    """Continuous batching on one replica. Not thread-safe; one caller drives `step`."""

    def __init__(self, config: Config, rank: Rank, prompts: PromptReader, text: bool = True) -> None:
        """text: whether outputs carry text; without it, text is only produced to find stop strings."""
        self.config, self.rank, self.prompts = config, rank, prompts
        self.worker, self.channel = rank.worker, rank.channel
        cache, states, shape = rank.worker.cache, rank.worker.states, rank.worker.model.shape
        mover = rank.worker.offload
        tier = None if mover is None else OffloadTier(*mover.sizes)
        below = None if tier is None else tier.pools[-1]
        allocator = BlockPools(
            cache.blocks_of_groups,
            cache.shape.block_size,
            config.cache.enable_prefix_caching,
            cache.groups.attention_spans,
            None if states is None else SnapshotPool(states.num_snapshots, states.first_snapshot, below),
            tier,
        )
        interval = config.cache.snapshot_interval
        self.scheduler = Scheduler(config.scheduler, allocator, shape.max_model_len, snapshot_interval=interval)
        self.requests = RequestTable(config, self.scheduler, prompts, shape.vocab_size, text)
        self.sleep = SleepState()
        self.policies = PolicyControl(config, rank, self.scheduler, self.requests, self.sleep)
        self.speculation = start_speculation(config, rank, self.requests, self.policies)
        self.stats = StepStats()
        self.choose_mode: Callable[[Batch], Mode] | None = None
        """Overrides the policy; for tests and tools that choose the modes themselves."""
        self._in_flight: InFlightStep | None = None
        self._last_completed = 0.0
        self._sequence = itertools.count()

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
        """Queue a prompt (text, token ids or chat messages); returns its request id.

        adapter: the name of a LoRA adapter, one of `lora.adapters`. Raises `RequestError`, and nothing is queued, if
        any part of it is invalid.
        """
        self.sleep.check_awake()
        return self.requests.add(prompt, params, request_id, priority, cache_salt, adapter)

    def abort(self, request_id: str) -> Completion | None:
        """End a request in any state; returns it with its outputs so far, or None if it is unknown or finished."""
        completion = self.requests.abort(request_id)
        self._drop_unneeded_step()
        return completion

    def abort_all(self) -> list[Completion]:
        """End every request; returns them with their outputs so far."""
        completions = self.requests.abort_all()
        self._drop_unneeded_step()
        return completions

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished

    # -- the main loop -----------------------------------------------------------------------------------------

    def step(self) -> list[Completion]:
        """Run one step; returns the requests that got a token or ended in it.

        With `scheduler.async_scheduling` the next step is launched before this one completes: see `InFlightStep`.
        """
        step = self._in_flight or self._launch()
        if step is None:
            return []
        self._in_flight = self._launch(step) if step.may_be_followed else None
        return self._complete(step)

    def settle(self) -> list[Completion]:
        """Complete the step in flight, if there is one, without launching another; returns the requests concerned."""
        step, self._in_flight = self._in_flight, None
        return [] if step is None else self._complete(step)

    def _launch(self, previous: InFlightStep | None = None) -> InFlightStep | None:
        """Schedule a step, send its plan to the other ranks and start it here; None if there is nothing to run.

        previous: the step that is still in flight.
        """
        scheduler = self.scheduler
        limit = self.policies.policy.prefill_limit(scheduler.running, scheduler.next_waiting)
        drafts: Mapping[int, Sequence[int]] = {}
        if self.speculation is not None and previous is None:
            drafts = self.speculation.draft(scheduler.running, scheduler.next_waiting)
        batch = scheduler.schedule(limit, previous is not None, drafts)
        self.requests.add_forgotten([request.index for request in batch.preempted])
        if batch.is_empty:
            return None
        decision = self._decide(batch)
        plan = self._plan(batch, decision.mode, previous)
        started = time.perf_counter()
        self.channel.send(STEP, plan.encode())
        may_replace = self.config.speculation.acceptance == "rejection"
        processed = self.config.runtime.logprobs_mode == "processed_logprobs"
        table = self.requests
        sources = {} if self.speculation is None else self.speculation.sources
        results = StepResults(batch, plan.items, table.sequences, table.decoder, may_replace, processed, sources)
        tokens = self.worker.run(plan, results.choose, results.pool)
        return InFlightStep(batch, plan, decision, results, tokens, started)

    def _decide(self, batch: Batch) -> Decision:
        if self.choose_mode is not None:
            return Decision(self.choose_mode(batch), FORCED)
        decision = self.policies.policy.decide(batch)
        return decision if self.speculation is None else decision._replace(drafts=self.speculation.reason)

    def _plan(self, batch: Batch, mode: Mode, previous: InFlightStep | None) -> StepPlan:
        full_logits = self.requests.need_full_logits(batch)
        keeps_tokens = (
            bool(self.config.scheduler.async_scheduling)
            and batch.num_tokens <= MAX_ASYNC_TOKENS
            and not self.requests.need_outputs
            and (self.speculation is None or not self.speculation.is_due(batch))
        )
        previous_rows = None if previous is None else previous.results.rows_of_requests
        dropped, moves = self.requests.take_forgotten(), self.scheduler.allocator.take_moves()
        return make_plan(next(self._sequence), mode, batch, dropped, full_logits, keeps_tokens, previous_rows, moves)

    def _complete(self, step: InFlightStep) -> list[Completion]:
        """Wait for a step's tokens and give them to their requests; returns the requests concerned."""
        step.complete()
        self._record(step)
        running = [item for item in step.batch.scheduled if not item.request.is_finished]
        self._end_impossible(step.results)
        self.scheduler.update(step.batch, step.results.tokens, step.results.accepted)
        if self.speculation is not None:
            self.speculation.observe(step.batch, step.results.accepted)
        completions = self._collect(running, step.results)
        self._drop_unneeded_step()
        return completions

    def _record(self, step: InFlightStep) -> None:
        plan, batch, decision = step.plan, step.batch, step.decision
        now = time.perf_counter()
        seconds, self._last_completed = now - max(step.started, self._last_completed), now
        record = StepRecord(plan.sequence, plan.mode, plan.num_tokens, batch.num_decode_rows, seconds, decision)
        self.stats.record(record)
        # A GPU step is only known to be done when something has come back from it.
        is_timed = self.worker.device.type == "cpu" or any(item.samples for item in batch.scheduled)
        is_timed = is_timed and self.worker.is_settled
        if is_timed and self.speculation is not None:
            self.speculation.times.observe(batch, decision.mode, seconds)
        if decision.reason != FORCED and is_timed:
            self.policies.policy.observe(batch, decision, seconds)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", record.explain())

    def _end_impossible(self, results: StepResults) -> None:
        """End requests whose constraints allow no token: normally if their grammar is complete, else with an error."""
        for index in [index for index, token in results.tokens.items() if token < 0]:
            completion, sequence = self.requests.sequences[index]
            try:
                self._end_without_token(completion, sequence)
            except Exception as error:  # grammar and tokenizer libraries raise anything
                self._fail(completion, sequence, error)

    def _end_without_token(self, completion: Completion, sequence: OutputSequence) -> None:
        row = sequence.row
        if row.error is not None:
            raise row.error
        sequence.detokenizer.finish()
        if row.may_end:
            self.scheduler.finish(sequence.request, "stop", sequence.detokenizer.stop_reason)
            return
        reason = CONSTRAINTS if row.is_constrained else None
        logger.warning("request %s: its constraints allow no token; ended with an error", completion.request_id)
        self.scheduler.finish(sequence.request, "error", reason)

    def _fail(self, completion: Completion, sequence: OutputSequence, error: Exception) -> None:
        """End one sequence because its own constraints or text raised; the other requests go on."""
        logger.error("request %s failed", completion.request_id, exc_info=error)
        self.scheduler.finish(sequence.request, "error", FAILED + kind_and_line(error))

    def _collect(self, items: list[ScheduledRequest], results: StepResults) -> list[Completion]:
        """Detokenize the sampled tokens and end sequences at stop strings; returns the requests that sampled."""
        touched: dict[str, Completion] = {}
        for item in items:
            if not item.samples:
                continue
            completion, sequence = self.requests.sequences[item.request.index]
            touched[completion.request_id] = completion
            if results.tokens[item.request.index] >= 0 and item.request.finish_reason != "abort":
                self._detokenize(completion, sequence)
            if item.request.is_finished:
                self.requests.forget(sequence.request)
        for completion in touched.values():
            if completion.is_finished:
                self.requests.forget_completion(completion)
        return list(touched.values())

    def _detokenize(self, completion: Completion, sequence: OutputSequence) -> None:
        """Give the new tokens to the detokenizer; end the sequence if that completes a stop string."""
        try:
            stop = sequence.take_tokens()
        except Exception as error:  # tokenizer libraries raise anything
            self._fail(completion, sequence, error)
            return
        if stop is not None and sequence.request.stop_reason != stop:
            self.scheduler.finish(sequence.request, "stop", stop)

    def _drop_unneeded_step(self) -> None:
        """Without unfinished requests nobody needs the result of the step in flight."""
        if not self.has_unfinished:
            self._in_flight = None
