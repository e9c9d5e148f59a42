"""A simulated engine around the real scheduler, which checks every step.

Its workers know only what batches tell them, its cache slots remember which tokens they depend on, and its model reads
only the cache: in every cache group, the slots that the group's layers see. It fails if one of them is gone.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.offload import LOAD, SPILL, STORE, OffloadTier
from ulysses_infer.cache.paged import CacheShape
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.cache.snapshots import SnapshotPool
from ulysses_infer.config import SchedulerConfig
from ulysses_infer.engine.request import Request, RequestStatus
from ulysses_infer.engine.scheduler import NO_DRAFTS, Batch, ScheduledRequest, Scheduler
from ulysses_infer.sampling_params import SamplingParams

VOCABULARY = 5
EOS = 4


def next_token(prefix: tuple[int, ...]) -> int:
    """The simulated model: a function of every token before."""
    return zlib.crc32(bytes(prefix)) % VOCABULARY


def lone_output(request: Request, max_model_len: int) -> list[int]:
    """What `request` produces alone, by the definition of its stopping rules."""
    tokens, output, params = list(request.prompt_token_ids), [], request.params
    while True:
        output.append(next_token(tuple(tokens)))
        tokens.append(output[-1])
        stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS,))}
        if output[-1] in stops and len(output) >= params.min_tokens:
            return output
        if len(output) == params.max_tokens or len(tokens) == max_model_len:
            return output


class Simulation:
    """Scheduler, simulated workers and simulated model. `requests` has every request ever added."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        caching: bool = True,
        attention_spans: tuple[AttentionSpan, ...] = (AttentionSpan(),),
        snapshots: int | None = None,
        snapshot_blocks: int = 1,
        tier: tuple[int, int] | None = None,
        **scheduler: Any,
    ) -> None:
        """num_blocks: of the first group; the others have what an engine would give them. snapshots: of recurrent
        states, every `snapshot_blocks` blocks; None: the model has no states. tier: slots in host memory and on disk of
        each pool; None: evicted blocks are lost."""
        self.config = SchedulerConfig(**{"max_num_batched_tokens": 8192, **scheduler})
        sizing = CacheSizing(
            CacheShape.uniform(len(attention_spans), 1, 1, 1, block_size, torch.float32),
            CacheGroups(attention_spans, (*range(len(attention_spans)),)),
            max_model_len,
            self.config.max_num_seqs,
            self.config.max_num_batched_tokens,
        )
        blocks = sizing.blocks_per_group(num_blocks)
        pools = len(blocks) + (snapshots is not None)
        self.tier = None if tier is None else OffloadTier(*([slots] * pools for slots in tier), [1] * pools)
        self.kept: dict[tuple[int, int], Any] = {}  # (pool, slot) of the tier -> what it holds
        below = None if self.tier is None else self.tier.pools[-1]
        self.pool = None if snapshots is None else SnapshotPool(snapshots, 100, below)
        self.allocator = BlockPools(blocks, block_size, caching, attention_spans, self.pool, self.tier)
        self.ticks = itertools.count()
        self.scheduler = Scheduler(
            self.config,
            self.allocator,
            max_model_len,
            clock=lambda: float(next(self.ticks)),
            snapshot_interval=snapshot_blocks * block_size,
        )
        self.max_model_len = max_model_len
        self.requests: list[Request] = []
        self.slots: dict[
            tuple[int, int, int], tuple[int, ...]
        ] = {}  # (group, block, offset) -> the tokens its KV depends on
        self.tables: dict[int, list[dict[int, int]]] = {}  # what workers know, by request index: blocks by group
        self.computed: dict[int, int] = {}  # the same: tokens of each request in the cache
        self.states: dict[int, tuple[int, ...]] = {}  # the tokens that the states of each running request depend on
        self.snapshots: dict[int, tuple[int, ...]] = {}  # the same of each snapshot slot
        self.num_restored = 0
        self.admitted: list[int] = []  # indices in order of admission
        self.outputs: dict[int, list[int]] = {}  # sampled tokens of each request, known to the host or not yet
        self.sampled: dict[int, dict[int, int]] = {}  # tokens sampled by each in-flight batch, by its id
        self.accepted: dict[int, dict[int, int]] = {}  # drafted tokens accepted, the same
        self.num_accepted = self.num_rejected = 0

    def add(self, prompt: list[int], priority: int = 0, salt: str = "", **params: Any) -> Request:
        index = len(self.requests)
        request = Request(
            request_id=f"r{index}",
            index=index,
            prompt_token_ids=prompt,
            params=SamplingParams(**params),
            arrival_time=0.0,
            priority=priority,
            eos_token_ids=frozenset({EOS}),
            cache_salt=salt,
        )
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self) -> Batch:
        batch = self.schedule()
        self.finish_step(batch)
        return batch

    def schedule(self, ahead: bool = False, drafts: Mapping[int, Sequence[int]] = NO_DRAFTS) -> Batch:
        """Schedule a step and run it: every token writes its slot, then the requests that sample read all theirs.

        `ahead`: `finish_step` of the step before has not been called. `drafts`: proposed tokens by request index.
        """
        unfinished = [r for r in self.requests if not r.is_finished]
        batch = self.scheduler.schedule(ahead=ahead, drafts=drafts)
        self._check_limits(batch, unfinished, ahead)
        self._check_preempted(batch, unfinished)
        if not batch.is_empty:
            self._move()
        self._mirror(batch)
        self._check_order(batch)
        self.check_blocks()
        for item in batch.scheduled:
            self._restore(item)
        for item in batch.scheduled:
            assert (item.checkpoint is not None) == (self.pool is not None and len(item.drafts) > 0)
            if item.checkpoint is not None:
                self.snapshots[item.checkpoint] = self.states[item.request.index]
        for item in batch.scheduled:
            self._write(item)
        for item in batch.scheduled:  # a layer writes the keys and values of all tokens before any of them attends
            self._check_slots(item.request, item.start, item.start)
        for item in batch.scheduled:
            self._save(item)
        accepted = {i.request.index: self._accept(i) for i in batch.scheduled if i.samples}
        self.accepted[id(batch)] = accepted
        self.sampled[id(batch)] = {index: self.outputs[index][-1] for index in accepted}
        return batch

    def finish_step(self, batch: Batch) -> list[Request]:
        """Give the scheduler the tokens that a step has sampled."""
        finished = self.scheduler.update(batch, self.sampled.pop(id(batch)), self.accepted.pop(id(batch)))
        for request in finished:
            assert request.output_token_ids == lone_output(request, self.max_model_len)
        return finished

    def run(self, max_steps: int = 3000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert all(request.is_finished for request in self.requests), "a request never ends"
        self.check_blocks()
        self.allocator.assert_idle()

    def check_blocks(self) -> None:
        """Holders and reference counts agree, requests that do not run hold nothing, no block is lost."""
        running = [r for r in self.requests if r.status is RequestStatus.RUNNING]
        assert self.scheduler.num_running == len(running)
        for group, pool in enumerate(self.allocator.pools):
            holders = Counter(block for request in running for block in request.block_tables[group])
            assert all(holders[b] == pool.reference_count(b) for b in range(pool.num_blocks))
            assert pool.num_used == len(holders)
        assert all(not r.block_tables for r in self.requests if r.status is not RequestStatus.RUNNING)
        self._check_snapshots(running)
        step, size = self.config.max_num_batched_tokens, self.allocator.block_size
        for request, (group, attention_span) in itertools.product(running, enumerate(self.allocator.attention_spans)):
            # rejected drafts may have left blocks for more tokens than are known
            num_tokens = max(request.num_tokens + request.num_placeholders, request.num_blocks * size)
            assert len(request.block_tables[group]) <= attention_span.most_blocks(num_tokens, step, size)

    def _check_snapshots(self, running: list[Request]) -> None:
        """Slots that requests have reserved, published ones and empty ones are all slots, without overlap."""
        reserved = [slot for request in running for _, slot in request.reserved_snapshots]
        reserved += [request.checkpoint for request in running if request.checkpoint is not None]
        idle = [request for request in self.requests if request.status is not RequestStatus.RUNNING]
        assert not any(request.reserved_snapshots or request.checkpoint is not None for request in idle)
        if self.pool is not None:
            assert len(set(reserved)) == len(reserved) == self.pool.num_reserved
            assert set(reserved) <= set(range(100, 100 + self.pool.num_slots))
            assert self.pool.num_held + self.pool.num_reserved <= self.pool.num_slots

    def _move(self) -> None:
        """Do the copies of a plan, one after another."""
        for kind, pool, source, target in self.allocator.take_moves():
            if kind == STORE:
                self.kept[pool, target] = self._content(pool, source)
            elif kind == SPILL:
                assert self.tier is not None
                self.kept[pool, self.tier.pools[pool].host_slots + target] = self.kept[pool, source]
            else:
                assert kind == LOAD
                self._fill(pool, target, self.kept[pool, source])

    def _content(self, pool: int, block: int) -> Any:
        if pool == len(self.allocator.pools):
            return self.snapshots[block]
        return [self.slots[pool, block, offset] for offset in range(self.allocator.block_size)]

    def _fill(self, pool: int, block: int, content: Any) -> None:
        if pool == len(self.allocator.pools):
            self.snapshots[block] = content
        else:
            self.slots |= {(pool, block, offset): tokens for offset, tokens in enumerate(content)}

    def _restore(self, item: ScheduledRequest) -> None:
        """The states that a request starts from are those after the tokens before."""
        index, tokens = item.request.index, tuple(self._tokens(item.request))
        if index not in self.states:
            assert (item.restored is None) == (item.start == 0 or self.pool is None)
            self.num_restored += item.restored is not None
            self.states[index] = tokens[: item.start] if item.restored is None else self.snapshots[item.restored]
        elif item.restored is not None:  # it goes back to before drafted tokens
            self.states[index] = self.snapshots[item.restored]
        assert self.states[index] == tokens[: item.start]

    def _save(self, item: ScheduledRequest) -> None:
        text = [*self._tokens(item.request), *item.drafts]
        self.states[item.request.index] = tuple(text[: item.start + item.num_new_tokens])
        if item.snapshot is not None:
            assert (item.start + item.num_new_tokens) % self.allocator.block_size == 0
            self.snapshots[item.snapshot] = self.states[item.request.index]

    def _tokens(self, request: Request) -> list[int]:
        return [*request.prompt_token_ids, *self.outputs.get(request.index, ())]

    def _check_limits(self, batch: Batch, unfinished: list[Request], ahead: bool) -> None:
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        assert self.scheduler.num_running <= self.config.max_num_seqs
        assert len({item.request.index for item in batch.scheduled}) == len(batch.scheduled)
        if ahead:
            assert not batch.preempted
        else:
            assert batch.is_empty == (not unfinished), "a step without progress"
            assert not batch.lacks_room

    def _check_preempted(self, batch: Batch, unfinished: list[Request]) -> None:
        running = [r for r in unfinished if r.status is RequestStatus.RUNNING]
        assert not {item.request for item in batch.scheduled} & set(batch.preempted)
        for victim in batch.preempted:
            assert victim is not min(unfinished, key=lambda r: r.precedence), "the first request was preempted"
            assert victim not in running
            assert all(r.precedence < victim.precedence for r in running), "a later request kept running"
            del self.tables[victim.index], self.computed[victim.index], self.states[victim.index]
            self.admitted.remove(victim.index)

    def _mirror(self, batch: Batch) -> None:
        """Do what a worker does with a batch before it computes."""
        new = [item.request for item in batch.scheduled if item.request.index not in self.tables]
        self.new = {request.index for request in new}
        self.admitted += [request.index for request in sorted(new, key=lambda r: r.precedence)]
        for item in batch.scheduled:
            index = item.request.index
            self._take_blocks(item)
            assert item.start == self.computed[index], "positions must follow without gap or repetition"
            num_tokens = len(self._tokens(item.request))
            assert num_tokens < item.request.length_limit, "a token that is certainly not needed"
            assert 0 < item.num_known_tokens <= num_tokens - item.start
            assert item.samples == (item.start + item.num_known_tokens == num_tokens)
            assert not item.drafts or (item.is_decode and num_tokens + len(item.drafts) < item.request.length_limit)

    def _take_blocks(self, item: ScheduledRequest) -> None:
        index, block_size = item.request.index, self.allocator.block_size
        is_new, new = index not in self.tables, list(item.new_block_ids)
        if is_new:
            self.tables[index], self.computed[index] = [{} for _ in self.allocator.attention_spans], item.start
        end = -(-(item.start + item.num_new_tokens) // block_size)
        for attention_span, table in zip(self.allocator.attention_spans, self.tables[index], strict=True):
            begin = attention_span.first_visible(item.start) // block_size if is_new else max(table) + 1
            table.update((block, new.pop(0)) for block in range(begin, end))
        assert not new
        for mine, held in zip(self.tables[index], item.request.block_tables, strict=True):
            assert list(mine.values())[len(mine) - len(held) :] == held
            assert max(mine) == item.request.num_blocks - 1

    def _check_order(self, batch: Batch) -> None:
        keys = [(not item.is_decode, self.admitted.index(item.request.index)) for item in batch.scheduled]
        assert keys == sorted(keys), "decodes first, each part in order of admission"

    def _check_slots(self, request: Request, start: int, stop: int) -> None:
        """In every group, what tokens from `start` on see before `stop` is in the right slots."""
        tokens = tuple(self._tokens(request)[:stop])
        for group, attention_span in enumerate(self.allocator.attention_spans):
            for position in range(attention_span.first_visible(start), stop):
                slot = self._slot(group, request, position)
                assert slot[1] in request.block_tables[group], "a block was freed too early"
                assert self.slots[slot] == tokens[: position + 1]

    def _write(self, item: ScheduledRequest) -> None:
        request, stop = item.request, item.start + item.num_new_tokens
        for position in range(item.start, stop):
            for group, pool in enumerate(self.allocator.pools):
                slot = self._slot(group, request, position)
                if pool.reference_count(slot[1]) > 1:
                    self._check_others(group, request, slot[1])
                self.slots[slot] = tuple([*self._tokens(request), *item.drafts][: position + 1])
        self.computed[request.index] = stop

    def _check_others(self, group: int, writer: Request, block: int) -> None:
        """Requests that share a block which a step fills start with this step."""
        others = [r for r in self.requests if r.block_tables and block in r.block_tables[group] and r is not writer]
        assert {request.index for request in others} <= self.new, "wrote into a shared block"

    def _accept(self, item: ScheduledRequest) -> int:
        """Sample a token after the known ones and after each draft that is right; returns how many are."""
        request, num_tokens = item.request, len(self._tokens(item.request))
        self._check_slots(request, item.start, num_tokens)
        output, accepted = self.outputs.setdefault(request.index, []), 0
        while True:
            output.append(next_token(self.slots[self._slot(0, request, num_tokens - 1 + accepted)]))
            if accepted == len(item.drafts) or item.drafts[accepted] != output[-1]:
                break
            accepted += 1
        if item.checkpoint is None:
            self.computed[request.index] -= len(item.drafts) - accepted
        elif accepted < len(item.drafts):
            self.computed[request.index] = item.start
        if item.drafts and self.pool is None:
            self.states[request.index] = tuple(self._tokens(request)[: self.computed[request.index]])
        self.num_accepted += accepted
        self.num_rejected += len(item.drafts) - accepted
        return accepted

    def _slot(self, group: int, request: Request, position: int) -> tuple[int, int, int]:
        block, offset = divmod(position, self.allocator.block_size)
        return group, self.tables[request.index][group][block], offset


def small_simulation(num_blocks=64, block_size=4, max_model_len=128, caching=True, **config):
    return Simulation(num_blocks, block_size, max_model_len, caching, **config)


def prompt(length, token=0):
    """Shares no block with the prompt of another `token`."""
    return [token] * length


def shape(batch):
    """`{request id: (start, new tokens)}` in batch order."""
    return {item.request.request_id: (item.start, item.num_new_tokens) for item in batch.scheduled}
