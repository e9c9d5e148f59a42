"""Rank 0's loop while serving: receive requests, run a step, send results."""

from __future__ import annotations

import logging
import time
from functools import partial

from ulysses_infer.config import ServerConfig
from ulysses_infer.engine.completion import Completion, Sequence
from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.expert_load import expert_load
from ulysses_infer.errors import EngineDeadError, RequestError, failure_reason, is_lost_connection, kind_and_line
from ulysses_infer.job.watchdog import Watchdog
from ulysses_infer.outputs import FAILED, Logprob
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.server.admin import Commands
from ulysses_infer.server.control import Control
from ulysses_infer.server.link import Link
from ulysses_infer.server.messages import (
    Abort,
    AdminCall,
    Dead,
    Draining,
    EngineState,
    Goodbye,
    NewToken,
    OffloadCounts,
    Ready,
    Refused,
    Reply,
    RequestStart,
    SnapshotCounts,
    SpeculationCounts,
    Stepped,
    StepReport,
    Submit,
    ToEngine,
)

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # between checks of the deadline while idle
NAMING_SECONDS = 0.5  # gives the watchdog time to name the lost rank; a failed collective does not


class EngineLoop:
    """Serves the HTTP process with the engine. `drain` and `stop` may be called from any thread."""

    def __init__(self, engine: Engine, link: Link, watch: Watchdog, settings: ServerConfig) -> None:
        self._engine, self._link, self._watchdog, self._settings = engine, link, watch, settings
        engine.rank.silent = partial(watch.silent, engine.config.runtime.step_timeout)
        self._reported: dict[int, int] = {}  # tokens sent of each unfinished sequence, by request index
        self._deadline: float | None = None
        self._stop_reason = ""
        self._wants_drain = False
        self._is_answered = False
        self._state_changed = False
        self._expert_tokens: list[int] = []  # per rank, as last collected
        self._expert_report_due = time.monotonic() + settings.log_interval
        self._control = Control(engine, self._report, self._submit)
        self._commands = Commands(engine, self.drain, self._report, self._control)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, ready: Ready) -> None:
        """Serve until drained or stopped. If a rank or the HTTP process fails, this process exits."""
        self._link.send(ready)
        while not self._is_over():
            for message in self._link.receive(self._drain_timeout()):
                self._take(message)
            if self._has_work:
                self._step()
                self._state_changed |= self._control.after_step()
            elif self._state_changed:
                self._report_state()
        self._link.flush(IDLE_SECONDS)

    def drain(self) -> None:
        """Accept no more requests; end when the running ones have finished, or after `server.shutdown_timeout`."""
        self._wants_drain = True
        self._link.wake()

    def stop(self, reason: str) -> None:
        """End after the current step; waiting requests get an error with `reason`."""
        self._stop_reason = self._stop_reason or reason
        self._link.wake()

    @property
    def is_draining(self) -> bool:
        """Whether an orderly shutdown is in progress."""
        return self._wants_drain

    @property
    def _has_work(self) -> bool:
        return self._engine.has_unfinished and not self._control.is_paused

    def _drain_timeout(self) -> float:
        return 0.0 if self._has_work else IDLE_SECONDS

    def _is_over(self) -> bool:
        if self._link.is_closed and not self._is_answered:
            self._watchdog.fail("the HTTP process ended unexpectedly")
        if self._wants_drain and self._deadline is None:
            self._start_draining()
        if self._deadline is not None and time.monotonic() > self._deadline and not self._is_answered:
            self.stop(f"the server was shut down after waiting {self._settings.shutdown_timeout:g} s for requests")
        if self._stop_reason:
            self._link.send(Dead(self._stop_reason, expected=True))
        return bool(self._stop_reason) or self._is_answered

    def _start_draining(self) -> None:
        self._deadline = time.monotonic() + self._settings.shutdown_timeout
        self._watchdog.announce_drain()
        self._link.send(Draining(self._deadline))

    def _step(self) -> None:
        started = time.monotonic()
        try:
            with self._watchdog.working():
                touched = self._engine.step()
                self._ask_for_expert_load()
        except Exception as error:  # after any error the ranks may be out of step
            self._end(error)
        record = self._engine.stats.recent[-1]
        step = StepReport(
            record.sequence,
            started,
            record.seconds,
            record.mode,
            record.num_tokens,
            record.num_decodes,
            self._engine.worker.groups.clock.take(),
        )
        tokens = [token for completion in touched for token in self._new_tokens(completion)]
        self._link.send(Stepped(self.state(), step, tokens))
        if not self._engine.has_unfinished:
            self._check_idle()

    def _ask_for_expert_load(self) -> None:
        """Collected at intervals only, because it needs a collective over all ranks."""
        if time.monotonic() > self._expert_report_due:
            self._expert_tokens = expert_load(self._engine.rank).get("expert_tokens_per_rank", [])
            self._expert_report_due = time.monotonic() + self._settings.log_interval

    def _end(self, error: Exception, what: str = "a step") -> None:
        cause = error.__cause__ or error
        if is_lost_connection(cause):
            time.sleep(NAMING_SECONDS)
        else:
            logger.error("%s failed", what, exc_info=error)
        self._watchdog.fail(f"{what} failed: {failure_reason(cause)}")

    def _check_idle(self) -> None:
        """An idle engine has all its blocks free. Anything else is a leak: log it as a bug."""
        allocator = self._engine.scheduler.allocator
        if allocator.num_used:
            logger.error("%d cache blocks are held by nobody; please report this", allocator.num_used)

    # -- messages from the HTTP process --------------------------------------------------------------------------

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                self._abort(message.request_id)
            case AdminCall():
                self._link.send(self._answer(message))
            case Goodbye():
                self._is_answered = True

    def _submit(self, message: Submit) -> None:
        if self._deadline is not None:
            self._refuse(message, "the server is shutting down; try another one", "overloaded")
            return
        limit = self._settings.max_num_queued_requests
        if self._control.holds and (limit is None or len(self._control.held) < limit):
            self._control.held.append(message)
            return
        if limit is not None and (self._control.holds or self._engine.requests.is_full(limit)):
            self._refuse(message, f"{limit} requests are waiting already; try again later", "overloaded")
            return
        try:
            params = SamplingParams.from_mapping(message.params)
            self._engine.add(
                message.token_ids,
                params,
                message.request_id,
                message.priority,
                self._control.salted(message.cache_salt),
                message.adapter,
            )
        except RequestError as error:
            self._refuse(message, str(error), "invalid")
        except Exception as error:  # nothing runs on it yet: a bug in one request must not end the others
            logger.exception("request %s could not be added", message.request_id)
            self._engine.abort(message.request_id)
            self._refuse(message, f"the engine could not take the request: {failure_reason(error)}", "internal")
        self._state_changed = True

    def _refuse(self, message: Submit, reason: str, kind: str) -> None:
        self._link.send(Refused(message.request_id, reason, kind))

    def _abort(self, request_id: str) -> None:
        self._control.forget(request_id)
        completion = self._engine.abort(request_id)
        if completion is not None:
            self._forget(completion)
            self._state_changed = True

    def _forget(self, completion: Completion) -> None:
        for sequence in completion.sequences:
            self._reported.pop(sequence.request.index, None)

    def _report(self, completions: list[Completion]) -> None:
        """Report what is new of requests without a step, as when an administrator has aborted them."""
        tokens = [token for completion in completions for token in self._new_tokens(completion)]
        self._link.send(Stepped(self.state(), None, tokens))

    def _answer(self, call: AdminCall) -> Reply:
        try:
            value = self._commands.run(call.name, call.arguments)
        except RequestError as error:
            return Reply(call.number, error=str(error))
        except EngineDeadError as error:  # the ranks are out of step
            self._end(error, f"the command {call.name}")
        except Exception as error:  # a bug in one command must not end running requests
            logger.exception("command %s failed", call.name)
            return Reply(call.number, error=f"{call.name} failed: {failure_reason(error)}")
        self._state_changed = True
        return Reply(call.number, value)

    # -- messages to the HTTP process ----------------------------------------------------------------------------

    def state(self) -> EngineState:
        """The engine's current load."""
        scheduler = self._engine.scheduler
        allocator = scheduler.allocator
        self._state_changed = False
        return EngineState(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_cache_usage=allocator.usage,
            prefix_cache_queries=allocator.prefix_stats.queries,
            prefix_cache_hits=allocator.prefix_stats.hits,
            num_preemptions=scheduler.num_preemptions,
            policy=self._engine.policies.policy.describe(),
            expert_tokens=self._expert_tokens,
            snapshots=self._snapshot_counts(),
            is_paused=self._control.is_paused,
            speculation=self._speculation_counts(),
            offload=self._offload_counts(),
        )

    def _speculation_counts(self) -> SpeculationCounts | None:
        if self._engine.speculation is None:
            return None
        stats = self._engine.speculation.stats
        return SpeculationCounts(
            stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens, list(stats.accepted_per_position)
        )

    def _offload_counts(self) -> OffloadCounts | None:
        tier = self._engine.scheduler.allocator.tier
        if tier is None:
            return None
        moved = tier.stored_bytes, tier.loaded_bytes
        return OffloadCounts(tier.stats.queries, tier.stats.hits, *moved, tier.host_usage, tier.disk_usage)

    def _snapshot_counts(self) -> SnapshotCounts | None:
        states, pool = self._engine.worker.states, self._engine.scheduler.allocator.snapshots
        if states is None or pool is None:
            return None
        return SnapshotCounts(pool.num_held, pool.num_slots, pool.num_hits, states.num_bytes_per_slot)

    def _report_state(self) -> None:
        self._link.send(Stepped(self.state()))
        self._check_idle()

    def _new_tokens(self, completion: Completion) -> list[NewToken]:
        """The tokens generated since the last report. If they cannot be built, the request ends with an error."""
        new_tokens = []
        try:
            for index, sequence in enumerate(completion.sequences):
                new_tokens += self._new_sequence_tokens(completion, index, sequence)
        except Exception as error:  # a bug in one request's results must not end the others
            logger.exception("request %s could not be reported", completion.request_id)
            self._engine.abort(completion.request_id)
            self._forget(completion)
            return [
                NewToken(completion.request_id, index, -1, "error", FAILED + kind_and_line(error))
                for index in range(len(completion.sequences))
            ]
        if completion.is_finished:
            self._forget(completion)
        return new_tokens

    def _new_sequence_tokens(self, completion: Completion, index: int, sequence: Sequence) -> list[NewToken]:
        request = sequence.request
        known = self._reported.get(request.index, 0)
        if known < 0:  # already reported as finished
            return []
        version = self._control.weight_version
        new_tokens = [
            NewToken(
                completion.request_id,
                index,
                token,
                logprobs=_logprobs_at(sequence, position),
                weight_version=version,
            )
            for position, token in enumerate(request.output_token_ids[known:], start=known)
        ]
        if new_tokens and not any(self._reported.get(each.request.index) for each in completion.sequences):
            new_tokens[0].start = _start_of(completion, sequence)
        self._reported[request.index] = request.num_output_tokens
        if request.is_finished:
            new_tokens = new_tokens or [NewToken(completion.request_id, index, -1)]
            new_tokens[-1].finish_reason, new_tokens[-1].stop_reason = request.finish_reason, request.stop_reason
            self._reported[request.index] = -1
        return new_tokens


def _start_of(completion: Completion, sequence: Sequence) -> RequestStart:
    request, scored = sequence.request, completion.prompt_logprobs
    listed = None if scored is None else [None if entry is None else _listed(entry) for entry in scored]
    scheduled = request.first_scheduled_time or request.arrival_time
    pooled = None if completion.pooler is None else completion.pooler.vector()
    return RequestStart(request.num_cached_tokens, scheduled, listed, pooled)


def _logprobs_at(sequence: Sequence, position: int) -> list[tuple[int, float, int]] | None:
    if sequence.request.params.logprobs is None:
        return None
    return _listed(sequence.logprobs[position])


def _listed(entry: dict[int, Logprob]) -> list[tuple[int, float, int]]:
    return [(token, scored.logprob, scored.rank or 0) for token, scored in entry.items()]


def describe_engine(engine: Engine, weight_bytes: list[int], state: EngineState) -> Ready:
    """What the HTTP process needs to know about the engine."""
    shape, cache, parallel = engine.worker.model.shape, engine.worker.cache, engine.config.parallel
    return Ready(
        model=engine.config.model.path,
        max_model_len=shape.max_model_len,
        vocab_size=shape.vocab_size,
        eos_token_ids=sorted(engine.prompts.eos_token_ids),
        modes=[(mode.sp, mode.tp) for mode in parallel.available_modes],
        num_blocks=cache.num_blocks,
        block_size=cache.shape.block_size,
        weight_bytes_per_rank=weight_bytes,
        state=state,
        sampling_defaults=engine.prompts.sampling_defaults,
    )
