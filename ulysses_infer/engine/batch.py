"""The batch of one step: tokens of requests, and the step plan made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ulysses_infer.engine.request import Request
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.step_shape import StepShape
from ulysses_infer.worker.step_plan import ALL_LOGITS, LAST_LOGITS, NO_LOGITS, PlanItem, StepPlan, placeholder


class ScheduledRequest(NamedTuple):
    """One request's part of a step: its tokens at positions `[start, start + num_new_tokens)`.

    A named tuple, because hundreds are made every step.
    """

    request: Request
    start: int
    num_new_tokens: int
    new_block_ids: list[int]
    """Blocks appended to its block tables, group by group; on (re)admission the whole tables, shared blocks first."""
    samples: bool
    """Whether the step computes the request's last known token and so yields a new one."""

    @property
    def is_decode(self) -> bool:
        """Whether the step computes nothing but the token sampled last."""
        return self.samples and self.num_new_tokens == 1 and self.start >= len(self.request.prompt_token_ids)


@dataclass(frozen=True)
class Batch:
    """One step: decodes in running order, then prefill chunks; and who was preempted to make room."""

    scheduled: list[ScheduledRequest]
    preempted: list[Request]
    lacks_room: bool = False
    """Whether somebody would have been preempted, had it been allowed."""

    @property
    def num_tokens(self) -> int:
        """Batched tokens T of the step."""
        return sum(item.num_new_tokens for item in self.scheduled)

    @property
    def num_decodes(self) -> int:
        """Requests that decode one token."""
        return sum(item.is_decode for item in self.scheduled)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of prefill chunks, recomputed ones included."""
        return self.num_tokens - self.num_decodes

    @property
    def shape(self) -> StepShape:
        """The step in the numbers that its time depends on."""
        contexts, chunks = [], []
        for item in self.scheduled:
            if item.is_decode:
                contexts.append(item.start + 1)
            else:
                chunks.append((item.start, item.num_new_tokens))
        return StepShape.of(contexts, chunks)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self.scheduled


@dataclass
class BatchBuilder:
    """A batch in the making."""

    budget: int
    """Tokens that the step may still take."""
    prefill_budget: int
    """Of these, tokens that requests with more than one token left may take."""
    ahead: bool = False
    """Whether the tokens of the step before are not here; then nobody is preempted."""
    lacks_room: bool = False
    decodes: dict[int, ScheduledRequest] = field(default_factory=dict)
    prefills: dict[int, ScheduledRequest] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)

    def put(self, request: Request, num_new_tokens: int, new_block_ids: list[int], samples: bool) -> None:
        """Schedule the next `num_new_tokens` tokens of `request`."""
        item = ScheduledRequest(request, request.num_computed_tokens, num_new_tokens, new_block_ids, samples)
        (self.decodes if item.is_decode else self.prefills)[request.index] = item
        self.budget -= num_new_tokens
        self.prefill_budget -= 0 if item.is_decode else num_new_tokens

    def drop(self, request: Request) -> None:
        """Take a preempted request out again, if it was in; its tokens return to the budget."""
        item = self.decodes.pop(request.index, None) or self.prefills.pop(request.index, None)
        if item is not None:
            self.budget += item.num_new_tokens
            self.prefill_budget += 0 if item.is_decode else item.num_new_tokens
        self.preempted.append(request)

    def build(self) -> Batch:
        """The finished batch."""
        return Batch([*self.decodes.values(), *self.prefills.values()], self.preempted, self.lacks_room)


def make_plan(
    sequence: int,
    mode: Mode,
    batch: Batch,
    dropped: Sequence[int],
    full_logits: bool,
    keeps_tokens: bool = False,
    rows_before: Mapping[int, int] | None = None,
) -> StepPlan:
    """The plan of `batch` in `mode`. `rows_before`: by request, the row of the step before whose token it awaits."""
    items, tokens = [], []
    for request, start, count, new_block_ids, samples in batch.scheduled:
        known = request.token_ids_from(start, start + count)
        tokens += known
        if len(known) < count:
            assert rows_before is not None, "a token is placeholder, and from no step"
            tokens.append(placeholder(rows_before[request.index]))
        wants_prompt = request.params.prompt_logprobs is not None and start < request.num_prompt_tokens
        logits = ALL_LOGITS if wants_prompt else LAST_LOGITS if samples else NO_LOGITS
        items.append(PlanItem(request.index, start, count, new_block_ids, logits, request.adapter))
    return StepPlan(sequence, mode, items, np.array(tokens, dtype=np.int32), list(dropped), full_logits, keeps_tokens)
