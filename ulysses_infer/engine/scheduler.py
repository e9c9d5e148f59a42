"""The scheduler: continuous batching with chunked prefill over a paged cache.

Every step, running requests go on first, in the order they were admitted; what is left of the token budget
then admits waiting requests, strictly in their order of precedence (no later request overtakes one that does
not fit). Prompts are computed in chunks, so prefills and decodes mix in a step. When blocks run out, the
running request of lowest precedence is preempted: its blocks return and it is recomputed later, helped by the
prefix cache.

Precedence is arrival order (fcfs), or priority and then arrival. It is a total order, and a request only ever
loses blocks to one that precedes it; so the first one always advances and every request ends. No decision
reads a clock.

Sources: iteration-level scheduling: Yu et al., "Orca", OSDI 2022; preemption by recomputation: Kwon et al.,
SOSP 2023; prefill chunks mixed with decodes: Agrawal et al., "Sarathi-Serve", OSDI 2024; one token count per
request for prefill and decode alike: vLLM's V1 scheduler.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

from ulysses_infer.cache.pools import BlockPools, GroupBlockIds
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.admission import WaitingQueue, check_request, first_chunk, length_limit
from ulysses_infer.engine.batch import Batch, BatchBuilder, ScheduledRequest
from ulysses_infer.engine.request import Request, RequestStatus
from ulysses_infer.engine.snapshot_points import SnapshotPoints
from ulysses_infer.errors import RequestError

__all__ = ["Batch", "ScheduledRequest", "Scheduler"]

NO_DRAFTS: Mapping[int, Sequence[int]] = {}
NO_ACCEPTED: Mapping[int, int] = {}


class Scheduler:
    """Holds every unfinished request and decides what the next step computes.

    Call `schedule`, run the batch, call `update`, in this order; call `add`, `abort` and `finish` between them at any
    time. One batch may be scheduled `ahead` of the previous batch's `update`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: BlockPools,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
        snapshot_interval: int = 1,
    ) -> None:
        """snapshot_interval: tokens between snapshots of recurrent states, a multiple of the block size."""
        self.config = config
        self.allocator = allocator
        self.max_model_len = max_model_len
        self.num_preemptions = 0
        """Preemptions since the start."""
        self._block_size = allocator.block_size
        self._clock = clock  # only for timestamps; no decision depends on it
        self._arrivals = itertools.count()
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self._running: dict[int, Request] = {}  # by index, in order of admission
        self._snapshots = SnapshotPoints(allocator, snapshot_interval)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs; then `schedule` never returns an empty batch."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Admitted requests."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet, or preempted."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue `request`. Raises RequestError if it could never finish or its id is taken."""
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use; use another")
        check_request(request, self.config, self.allocator, self.max_model_len)
        request.length_limit = length_limit(request, self.max_model_len)
        priority = request.priority if self.config.policy == "priority" else 0
        request.precedence = (priority, next(self._arrivals))
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request in any state, even during a step; its blocks are freed at once.

        Returns the request, or None if no unfinished request has this id.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(self, request: Request, finish_reason: str, stop_reason: int | str | None = None) -> None:
        """End `request`, for example at a stop string that only its text shows.

        If it has already ended, because the stop string came with its last token, only the reasons change.
        """
        if request.is_finished:
            request.finish_reason, request.stop_reason = finish_reason, stop_reason
            return
        del self._requests[request.request_id]
        if request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
        else:
            self._stop_running(request)
        request.end(finish_reason, stop_reason, self._clock())

    def _stop_running(self, request: Request) -> None:
        del self._running[request.index]
        self.allocator.free(request.block_tables)
        self._snapshots.release(request)

    @property
    def running(self) -> list[Request]:
        """Admitted requests in order of admission."""
        return list(self._running.values())

    @property
    def next_waiting(self) -> Request | None:
        """The request that is admitted next."""
        return self._waiting.first if self._waiting else None

    def schedule(
        self,
        max_prefill_tokens: int | None = None,
        ahead: bool = False,
        drafts: Mapping[int, Sequence[int]] = NO_DRAFTS,
    ) -> Batch:
        """Choose the next step: up to `max_num_batched_tokens` tokens of up to `max_num_seqs` requests.

        max_prefill_tokens: limits the tokens of prompts and recomputed texts (at least 1). It has no effect without
        chunked prefill, because a long prompt could then wait forever.

        ahead: the tokens of the previous step are not known yet. Requests that may end with them decode once more, and
        the result is dropped if they did. Nothing is preempted: if blocks run short, the batch only says so.

        drafts: tokens proposed after the last known one, by `request.index`. They are verified beside it as far as the
        budget and free blocks allow; no decode waits and nothing is preempted for them. Not with `ahead`.
        """
        most = self.config.max_num_batched_tokens
        most_of_prompts = most if max_prefill_tokens is None else max_prefill_tokens
        is_plain = not drafts and not self._snapshots.has_states
        step = BatchBuilder(most, most_of_prompts, ahead, drafts=drafts, is_plain=is_plain)
        for request in list(self._running.values()):
            if step.budget == 0 or step.lacks_room:
                break
            # an earlier request in this loop may have preempted it
            if request.status is RequestStatus.RUNNING:
                self._continue(request, step)
        while self._waiting and min(step.budget, step.prefill_budget) > 0 and not step.lacks_room:
            request = self._waiting.first
            if request in step.preempted or not self._admit(request, step):
                break
        batch = step.build()
        for request, _, num_new_tokens, _, samples, _, _, _, _ in batch.scheduled:
            request.num_computed_tokens += num_new_tokens
            request.num_placeholders += samples
        return batch

    def update(
        self, batch: Batch, sampled: Mapping[int, int], accepted: Mapping[int, int] = NO_ACCEPTED
    ) -> list[Request]:
        """Apply the result of `batch`. `sampled` maps `request.index` to the sampled token id, `accepted` to how many
        of its drafted tokens come before that one (0 if it is not listed).

        A request goes back to its accepted tokens; later steps overwrite the slots of the others. With recurrent
        states it goes back to before the step unless all were accepted, and computes the accepted ones again. Returns
        the requests that end with this step. Requests aborted during the step are skipped.
        """
        now, block_size = self._clock(), self.allocator.block_size
        finished = []
        for request, start, num_new_tokens, _, samples, _, _, drafts, _ in batch.scheduled:
            if request.status is RequestStatus.FINISHED:
                continue
            ending, end = None, start + num_new_tokens
            if drafts:
                ending = request.append_drafts(drafts[: accepted.get(request.index, 0)], now)
                end = request.num_computed_tokens = self._end_of_accepted(request, start, end)
            if end // block_size != request.num_published_blocks:
                self._publish_full_blocks(request, end)
            if request.reserved_snapshots:
                self._snapshots.publish(request, end)
            if samples and ending is None:
                ending = request.append_token(sampled[request.index], now)
            if ending is not None:
                self.finish(request, *ending)
                finished.append(request)
        return finished

    def _continue(self, request: Request, step: BatchBuilder) -> None:
        """Schedule the next tokens of a running request, preempting others, or itself, if blocks run out."""
        assert request.num_placeholders <= step.ahead, "every schedule() needs its update()"
        if request.num_placeholders and request.is_last_token_pending:
            return
        start, num_tokens_left = request.num_computed_tokens, request.num_tokens_left
        has_block = start < request.num_blocks * self._block_size
        if step.is_plain and num_tokens_left == 1 and has_block and start >= request.num_prompt_tokens:
            step.put_decode(request)
            return
        num_new_tokens = num_tokens_left
        if num_tokens_left > 1:
            count = min(num_tokens_left, step.budget, step.prefill_budget)
            if count <= 0:
                return
            num_new_tokens = self._chunk(request, start, count, num_tokens_left)
        num_tokens = start + num_new_tokens
        drafts = self._possible_drafts(request, step) if step.drafts else ()
        new_block_ids = []
        if num_tokens + len(drafts) > request.num_blocks * self.allocator.block_size:
            num_blocks = self._missing_blocks(request, num_tokens)
            self.allocator.free_out_of_window_blocks(
                request.block_tables, request.num_blocks, request.num_computed_tokens, request.num_prompt_tokens
            )
            if num_blocks > self.allocator.num_free and not self._preempt_for(request, num_blocks, step):
                return
            drafts = self._fitting_drafts(request, num_tokens, drafts)
            num_blocks = self._missing_blocks(request, num_tokens + len(drafts))
            new_block_ids = self.allocator.extend(request.block_tables, num_blocks)
            request.num_blocks += num_blocks
        restored = None if drafts else self._snapshots.drop_checkpoint(request)
        snapshot = None if drafts else self._snapshots.reserve(request, num_tokens)
        num_new_tokens, samples = num_new_tokens + len(drafts), num_new_tokens == num_tokens_left
        step.put(request, num_new_tokens, new_block_ids, samples, restored, snapshot, drafts, request.checkpoint)

    def _end_of_accepted(self, request: Request, start: int, end: int) -> int:
        """Computed tokens of `request` after a step from `start` to `end` with drafted tokens, of which it has appended
        the accepted ones."""
        if request.checkpoint is not None and request.num_tokens < end:
            return start
        self._snapshots.drop_checkpoint(request)
        return request.num_tokens

    def _missing_blocks(self, request: Request, num_tokens: int) -> int:
        """Blocks that `request` needs for `num_tokens` tokens and does not have. Rejected drafts may have left some."""
        return max(0, self.allocator.blocks_for(num_tokens) - request.num_blocks)

    def _possible_drafts(self, request: Request, step: BatchBuilder) -> tuple[int, ...]:
        """The proposed tokens of a decode that the step has a budget for, and that the request may output with one more
        token after them. None if it has recurrent states and there is no slot to come back to them."""
        if request.num_tokens_left > 1 or request.num_computed_tokens < request.num_prompt_tokens:
            return ()
        most = min(step.budget - len(self._running), request.max_tokens_left - 1)
        drafts = tuple(step.drafts.get(request.index, ())[: max(0, most)])
        return drafts if drafts and self._snapshots.checkpoint(request) else ()

    def _fitting_drafts(self, request: Request, num_tokens: int, drafts: tuple[int, ...]) -> tuple[int, ...]:
        """The leading `drafts` after `num_tokens` tokens for which there are blocks. One block per running request
        stays free, as for admission: drafts must not cause preemptions."""
        own = self._missing_blocks(request, num_tokens)
        spare = max(0, self.allocator.num_free - own - len(self._running))
        room = (request.num_blocks + own + spare) * self.allocator.block_size - num_tokens
        if drafts and not room:
            self._snapshots.drop_checkpoint(request)
        return drafts[:room]

    def _preempt_for(self, request: Request, num_blocks: int, step: BatchBuilder) -> bool:
        """Preempt requests from the end of the order until `num_blocks` are free. False if that would preempt `request`
        itself."""
        if step.ahead:
            step.lacks_room = True
            return False
        while num_blocks > self.allocator.num_free:
            victim = max(self._running.values(), key=_precedence)
            self._preempt(victim, step)
            if victim is request:
                return False
        return True

    def _admit(self, request: Request, step: BatchBuilder) -> bool:
        """Start the first waiting request after its cached prefix, if there is room."""
        if not self._may_have_room(request):
            return False
        num_cached, cached = self._cached_prefix(request)
        num_cached_tokens = num_cached * self.allocator.block_size
        num_tokens_left = request.num_tokens - num_cached_tokens
        num_new_tokens = first_chunk(num_tokens_left, min(step.budget, step.prefill_budget), self.config)
        num_new_tokens = self._chunk(request, num_cached_tokens, num_new_tokens, num_tokens_left)
        if num_new_tokens == 0 or not self._make_room(request, cached, step):
            return False
        self._waiting.pop()
        num_present = self.allocator.claim(cached, request.block_hashes[:num_cached])
        request.num_blocks = self.allocator.blocks_for(num_cached_tokens + num_new_tokens)
        request.block_tables = cached
        self.allocator.extend(cached, request.num_blocks - num_cached)
        self._start(request, num_cached_tokens, num_present * self.allocator.block_size)
        block_ids = [block for table in cached for block in table]
        restored = self._snapshots.restored(request, num_cached_tokens)
        snapshot = self._snapshots.reserve(request, num_cached_tokens + num_new_tokens)
        step.put(request, num_new_tokens, block_ids, num_new_tokens == num_tokens_left, restored, snapshot)
        if not self._snapshots.has_states:  # a state is saved only after the step
            self._publish_full_blocks(request, num_cached_tokens + num_new_tokens)
        return True

    def _chunk(self, request: Request, start: int, count: int, left: int) -> int:
        """How many of `count` tokens from `start` a step takes, so that the states after them can be saved."""
        if count == 0 or left == 1 or not self.config.enable_chunked_prefill:
            return count
        return self._snapshots.chunk(request, start, count, left)

    def _start(self, request: Request, num_cached_tokens: int, num_present_tokens: int) -> None:
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_cached_tokens
        request.num_published_blocks = num_cached_tokens // self.allocator.block_size
        self._running[request.index] = request
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = num_cached_tokens
            if self._reads_prefix_cache(request):
                self.allocator.record_lookup(request.num_prompt_tokens, num_present_tokens, num_cached_tokens)

    def _may_have_room(self, request: Request) -> bool:
        """A cheap check before the prefix cache is searched: a free sequence slot and enough blocks, or a request to
        displace."""
        if len(self._running) < min(self.config.max_num_seqs, self.allocator.num_free):
            return True
        return any(r.precedence[0] > request.precedence[0] for r in self._running.values())

    def _make_room(self, request: Request, cached: GroupBlockIds, step: BatchBuilder) -> bool:
        """Whether there is a sequence slot and enough blocks for `request`, displacing running requests if necessary.

        Only requests of strictly lower priority are displaced, never under fcfs, and only if all of them together hold
        enough. (vLLM's first scheduler did the same; its V1 makes the urgent request wait.)
        """
        if self._has_room(request, cached):
            return True
        less_urgent = [r for r in self._running.values() if r.precedence[0] > request.precedence[0]]
        if not self._has_room(request, cached, without=less_urgent):
            return False
        if step.ahead:
            step.lacks_room = True
            return False
        less_urgent.sort(key=_precedence)
        while less_urgent and not self._has_room(request, cached):
            self._preempt(less_urgent.pop(), step)
        return self._has_room(request, cached)

    def _has_room(self, request: Request, cached: GroupBlockIds, without: Sequence[Request] = ()) -> bool:
        """Whether a slot and blocks for all known tokens of `request` would be free if the requests `without` did not
        run. This is an upper bound, because blocks may be shared. One block per running request is kept free:
        otherwise their growth would soon preempt the new request."""
        num_running = len(self._running) - len(without)
        return num_running < self.config.max_num_seqs and self.allocator.can_allocate(
            request.num_tokens,
            self.config.max_num_batched_tokens,
            cached,
            spare=num_running,
            without=[r.block_tables for r in without],
        )

    def _preempt(self, request: Request, step: BatchBuilder) -> None:
        """Move a running request back to the queue, without its blocks, and remove its part of `step`."""
        self.requeue(request)
        step.drop(request)

    def requeue(self, request: Request) -> None:
        """Move a running request back to the queue, without its blocks: it is computed again."""
        self.num_preemptions += 1
        self._stop_running(request)
        request.restart()
        self._waiting.push(request)

    def _reads_prefix_cache(self, request: Request) -> bool:
        # Log-probabilities of the prompt, and vectors of all its tokens, need the model's output at every position.
        params = request.params
        is_allowed = params.prompt_logprobs is None and params.pooling in (None, "last")
        return self.allocator.enable_prefix_caching and is_allowed

    def _cached_prefix(self, request: Request) -> tuple[int, GroupBlockIds]:
        """The number of cached blocks that `request` can start after, and its block tables then. The last known token
        is never skipped, because its output is needed."""
        if not self._reads_prefix_cache(request):
            return self.allocator.match_prefix([])
        num_blocks = (request.num_tokens - 1) // self.allocator.block_size
        hashes = request.hashes_of_blocks(num_blocks, self.allocator.block_size)[:num_blocks]
        self._snapshots.look_up(request, hashes)
        return self.allocator.match_prefix(hashes)

    def _publish_full_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish the blocks that are full with `num_computed_tokens` in the prefix cache. All these tokens are known.

        Those of a request's first step are published before it runs, for requests that are admitted to the same step:
        every layer writes the keys and values of all tokens before any of them attends. No request that is admitted
        later displaces this one from the step.
        """
        num_full = num_computed_tokens // self.allocator.block_size
        if not self.allocator.enable_prefix_caching:
            return
        hashes = request.hashes_of_blocks(num_full, self.allocator.block_size)
        start = request.num_published_blocks
        self.allocator.publish(request.block_tables, request.num_blocks, start, hashes[start:num_full])
        request.num_published_blocks = num_full


def _precedence(request: Request) -> tuple[int, int]:
    return request.precedence
