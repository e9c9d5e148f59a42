"""The batch of one step: tokens of requests, and the step plan made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from ulysses_infer.cache.offload import Move
from ulysses_infer.engine.request import Request
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.step_shape import StepShape
from ulysses_infer.worker.step_plan import (
    ALL_LOGITS,
    DRAFT_LOGITS,
    LAST_LOGITS,
    NO_LOGITS,
    PlanItem,
    StepPlan,
    placeholder,
)


class ScheduledRequest(NamedTuple):
    """One request's part of a step: its tokens at positions `[start, start + num_new_tokens)`.

    A named tuple, because every step makes up to hundreds of them.
    """

    request: Request
    start: int
    num_new_tokens: int
    new_block_ids: list[int]
    """Blocks appended to its block tables, one cache group after another; on admission the whole tables, shared blocks
    first."""
    samples: bool
    """Whether the step computes the request's last known token and so samples a new one."""
    restored: int | None = None
    """The snapshot of recurrent states that it starts from."""
    snapshot: int | None = None
    """Where its states are saved after the step."""
    drafts: tuple[int, ...] = ()
    """Drafted tokens that the step verifies: its last ones, not known tokens."""
    checkpoint: int | None = None
    """Where its recurrent states are saved before the step, because of the drafted tokens."""

    @property
    def num_known_tokens(self) -> int:
        """Tokens of the step that are not drafted."""
        return self.num_new_tokens - len(self.drafts)

    @property
    def is_decode(self) -> bool:
        """Whether the step computes only the token sampled last, and drafted ones after it."""
        is_last = self.samples and self.num_new_tokens == 1 + len(self.drafts)
        return is_last and self.start >= self.request.num_prompt_tokens


_scheduled_request = partial(tuple.__new__, ScheduledRequest)  # a call of the class itself takes twice as long


@dataclass(frozen=True)
class Batch:
    """One step, and the requests preempted for it."""

    decodes: list[ScheduledRequest]
    """Requests that compute the token sampled last, and drafted ones after it, in running order."""
    chunks: list[ScheduledRequest]
    """The other ones: chunks of prompts and of recomputed texts."""
    preempted: list[Request] = field(default_factory=list)
    lacks_room: bool = False
    """Whether a request would have been preempted if that had been allowed."""

    @cached_property
    def scheduled(self) -> list[ScheduledRequest]:
        """Decodes, then chunks: the order of the step's tokens."""
        return self.decodes + self.chunks

    @cached_property
    def num_tokens(self) -> int:
        """Batched tokens T of the step."""
        return sum([item.num_new_tokens for item in self.scheduled])

    @property
    def num_decodes(self) -> int:
        """Requests that decode one token."""
        return len(self.decodes)

    @property
    def num_drafted(self) -> int:
        """Drafted tokens that the step verifies."""
        return sum([len(item.drafts) for item in self.decodes])

    @property
    def num_decode_rows(self) -> int:
        """Tokens of decodes, drafted ones included."""
        return self.num_decodes + self.num_drafted

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of prefill chunks, including recomputed ones."""
        return self.num_tokens - self.num_decode_rows

    @cached_property
    def shape(self) -> StepShape:
        """The features of the step that its time depends on. A drafted token counts as one more decode."""
        contexts = [item.start + 1 for item in self.decodes]
        for item in [item for item in self.decodes if item.drafts]:
            contexts += range(item.start + 2, item.start + 1 + item.num_new_tokens)
        return StepShape.of(contexts, [(item.start, item.num_new_tokens) for item in self.chunks])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self.scheduled


@dataclass
class BatchBuilder:
    """A batch under construction."""

    budget: int
    """Tokens that the step can still take."""
    prefill_budget: int
    """How many of these may belong to requests with more than one token left."""
    ahead: bool = False
    """Whether the previous step's tokens are not known yet; nothing is preempted then."""
    lacks_room: bool = False
    decodes: dict[int, ScheduledRequest] = field(default_factory=dict)
    prefills: dict[int, ScheduledRequest] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)
    drafts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """The tokens proposed after the known ones of each decoding request, by its index."""
    is_plain: bool = False
    """Whether decodes have neither drafted tokens nor recurrent states."""

    def put(
        self,
        request: Request,
        num_new_tokens: int,
        new_block_ids: list[int],
        samples: bool,
        restored: int | None = None,
        snapshot: int | None = None,
        drafts: tuple[int, ...] = (),
        checkpoint: int | None = None,
    ) -> None:
        """Schedule the next `num_new_tokens` tokens of `request`, the `drafts` among them."""
        start = request.num_computed_tokens
        item = _scheduled_request(
            (request, start, num_new_tokens, new_block_ids, samples, restored, snapshot, drafts, checkpoint)
        )
        self.budget -= num_new_tokens
        if item.is_decode:
            self.decodes[request.index] = item
        else:
            self.prefills[request.index] = item
            self.prefill_budget -= num_new_tokens

    def put_decode(self, request: Request) -> None:
        """Schedule the last known token of `request`, which has a block for it, in a plain step."""
        self.decodes[request.index] = _scheduled_request(
            (request, request.num_computed_tokens, 1, [], True, None, None, (), None)
        )
        self.budget -= 1

    def drop(self, request: Request) -> None:
        """Remove a preempted request, if the batch contains it; its tokens return to the budget."""
        item = self.decodes.pop(request.index, None) or self.prefills.pop(request.index, None)
        if item is not None:
            self.budget += item.num_new_tokens
            self.prefill_budget += 0 if item.is_decode else item.num_new_tokens
        self.preempted.append(request)

    def build(self) -> Batch:
        """The finished batch."""
        return Batch([*self.decodes.values()], [*self.prefills.values()], self.preempted, self.lacks_room)


def make_plan(
    sequence: int,
    mode: Mode,
    batch: Batch,
    dropped: Sequence[int],
    full_logits: bool,
    keeps_tokens: bool = False,
    previous_rows: Mapping[int, int] | None = None,
    moves: Sequence[Move] = (),
) -> StepPlan:
    """The plan of `batch` in `mode`. previous_rows: for each request with a placeholder token, the logits row of the
    previous step that determines it. moves: copies between the cache and the tier below it."""
    items, tokens = [], []
    for item in batch.scheduled:
        request, start, count = item.request, item.start, item.num_new_tokens
        known = request.token_ids_from(start, start + item.num_known_tokens)
        tokens += known
        if len(known) < item.num_known_tokens:
            assert previous_rows is not None, "a token is placeholder, and from no step"
            tokens.append(placeholder(previous_rows[request.index]))
        tokens += item.drafts
        items.append(PlanItem(request.index, start, count, item.new_block_ids, _logits(item), request.adapter))
    return StepPlan(
        sequence,
        mode,
        items,
        np.array(tokens, dtype=np.int32),
        list(dropped),
        full_logits,
        keeps_tokens,
        tuple((item.request.index, item.restored) for item in batch.scheduled if item.restored is not None),
        tuple((item.request.index, item.snapshot) for item in batch.scheduled if item.snapshot is not None),
        tuple((item.request.index, item.checkpoint) for item in batch.scheduled if item.checkpoint is not None),
        any(item.request.params.pooling is not None for item in batch.scheduled),
        moves,
    )


def _logits(item: ScheduledRequest) -> int:
    """Which rows of a request's tokens need logits."""
    if item.drafts:
        # Recurrent layers take a sequence's tokens one after another, so that these are not laid out by row.
        return DRAFT_LOGITS if item.checkpoint is None else ALL_LOGITS
    params = item.request.params
    reads_all = params.prompt_logprobs is not None or params.pooling in ("mean", "cls")
    if reads_all and item.start < item.request.num_prompt_tokens:
        return ALL_LOGITS
    return LAST_LOGITS if item.samples else NO_LOGITS
