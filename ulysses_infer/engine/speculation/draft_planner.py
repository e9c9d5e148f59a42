"""How many proposed tokens a step verifies: as many as give the most tokens per second, or the best time per token, in
the mode that suits them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.step_shape import StepShape, sizes_between

WORTH_TRYING = 1.5  # a kind of step that was never measured is tried unless its predicted time exceeds by this factor
TRIED_FOR = 1.15  # and if it brings more tokens by more than this factor
GROWTH = 8  # and only up to this many times the rows of a smaller kind that was measured: predictions may be far off


class Prediction(NamedTuple):
    """The predicted time of a step in the mode that it would run in."""

    mode: Mode
    seconds: float
    is_measured: bool
    """Whether such a step has run before."""


class PlannedDrafts(NamedTuple):
    """How many tokens of each proposal a step verifies, and why."""

    counts: dict[int, int]
    """By request index; requests that are not listed have none."""
    reason: str


class DraftLength(NamedTuple):
    """How many tokens to draft for each request before any is known."""

    num_tokens: int
    least: tuple[float, ...]
    """The chance to be right that makes one more token worth its time, by the tokens drafted before it."""


class _Candidate(NamedTuple):
    """One proposed token: the output tokens it is worth, its request, and the context that its row attends to."""

    gain: float
    request: int
    context: int
    worth: float
    """What it adds to the aim; candidates are taken in this order."""


class DraftPlanner:
    """Chooses the number of drafted tokens and the mode together, from predicted step times and observed acceptance.

    Each drafted token is one more row of a decode step. Tokens are added in the order of their chance to be accepted;
    the number with the most expected tokens per second is taken, 0 included. So a step that is long because of other
    requests' tokens has drafts for which a short one has no time, and drafts end by themselves where rows cost more
    than they bring.
    """

    def __init__(
        self, predict: Callable[[StepShape], Prediction], aims_at_tpot: Callable[[], bool] = lambda: False
    ) -> None:
        """aims_at_tpot: whether the mean time per token of the requests counts, instead of their tokens per second."""
        self._predict, self._aims_at_tpot = predict, aims_at_tpot

    def plan(
        self,
        gains: Mapping[int, Sequence[float]],
        contexts: Mapping[int, int],
        chunks: list[tuple[int, int]],
        most: int,
    ) -> PlannedDrafts:
        """gains: for each proposed token of a request, by its index, the output tokens that it is worth, descending.
        contexts: known tokens of every request that decodes; chunks: (start, tokens) of the prefill chunks that are
        expected in the step; most: limit of drafted tokens in the step."""
        aims_at_tpot = self._aims_at_tpot()
        candidates = [
            candidate
            for index, values in gains.items()
            for candidate in _candidates(index, contexts[index], values, aims_at_tpot)
        ]
        candidates.sort(key=lambda each: (-each.worth, each.context))
        count, reason = self._best(candidates[:most], list(contexts.values()), chunks, aims_at_tpot)
        counts: dict[int, int] = {}
        for chosen in candidates[:count]:
            counts[chosen.request] = counts.get(chosen.request, 0) + 1
        return PlannedDrafts(counts, reason)

    def best_length(
        self,
        rates: Mapping[int, float],
        contexts: Mapping[int, int],
        chunks: list[tuple[int, int]],
        most: int,
        draft_seconds: Callable[[int], float],
    ) -> DraftLength:
        """The best number of tokens to draft for each request, 0 to `most`.

        rates: the chance of each request's tokens to be right, by its index; draft_seconds: the time to draft n tokens.
        contexts, chunks: as of `plan`.
        """
        aims_at_tpot, number = self._aims_at_tpot(), len(contexts)
        shape = StepShape.of(list(contexts.values()), chunks)
        plain = self._predict(shape).seconds
        seconds = self._with_drafts(shape.num_tokens, plain)
        costs = [plain]  # of the step and its drafts, by the tokens drafted for each request
        outputs = dict.fromkeys(contexts, 1.0)  # expected tokens of each request
        best, best_speed = 0, number / plain
        for count in range(1, most + 1):
            for index, rate in rates.items():
                outputs[index] += rate**count
            shape = shape._replace(
                num_decodes=shape.num_decodes + len(rates),
                decode_context=shape.decode_context + sum(contexts[index] + count for index in rates),
            )
            costs.append(seconds(shape) + draft_seconds(count))
            values = outputs.values()
            expected = number**2 / sum(1 / each for each in values) if aims_at_tpot else sum(values)
            if expected / costs[-1] > best_speed:
                best, best_speed = count, expected / costs[-1]
        return DraftLength(best, tuple(each * best_speed / len(rates) for each in _marginal_costs(costs, best)))

    def _best(
        self, candidates: list[_Candidate], contexts: list[int], chunks: list[tuple[int, int]], aims_at_tpot: bool
    ) -> tuple[int, str]:
        """The number of candidates, in order, with the most tokens per second, or the least mean time per token."""
        shape = StepShape.of(contexts, chunks)
        plain, number = self._predict(shape).seconds, float(len(contexts))
        seconds, base = self._with_drafts(shape.num_tokens, plain), number / plain
        best, best_speed = 0, base
        worth, context, taken = 0.0, shape.decode_context, 0
        for count in _counts_upto(len(candidates), shape.num_decodes):
            added, taken = candidates[taken:count], count
            worth += sum([candidate.worth for candidate in added])
            context += sum([candidate.context for candidate in added])
            expected = number / (1 - worth / number) if aims_at_tpot else number + worth
            step = shape._replace(num_decodes=shape.num_decodes + count, decode_context=context)
            speed = expected / seconds(step)
            if speed > best_speed:
                best, best_speed = count, speed
        if not best:
            return 0, f"0 of {len(candidates)} proposed tokens are worth their time"
        gain = best_speed / base - 1
        aim = "tokens per second for each request" if aims_at_tpot else "tokens per second"
        return best, f"{best} of {len(candidates)} proposed tokens, {gain:+.0%} expected {aim}"

    def _with_drafts(self, rows: int, plain: float) -> Callable[[StepShape], float]:
        """The predicted seconds of steps with drafts, to be asked for in the order of their size.

        rows, plain: tokens and seconds of the step without drafts. Little more than `plain` for a step that has to be
        tried first; infinite where predictions cannot be trusted yet.
        """
        trusted = GROWTH * rows

        def seconds(shape: StepShape) -> float:
            nonlocal trusted
            found = self._predict(shape)
            if found.is_measured:
                trusted = GROWTH * shape.num_tokens
                return found.seconds
            if shape.num_tokens > trusted:
                return math.inf
            return found.seconds if found.seconds > WORTH_TRYING * plain else min(found.seconds, TRIED_FOR * plain)

        return seconds


def _marginal_costs(costs: Sequence[float], best: int) -> list[float]:
    """The cost of one more token for each request, by the tokens before it: the mean for the first `best`, which are
    worth their time together; then the least mean of going on to any length."""
    mean = (costs[best] - costs[0]) / best if best else math.inf
    known = [count for count, cost in enumerate(costs) if cost < math.inf]
    more = [
        min([(costs[end] - costs[start]) / (end - start) for end in known if end > start], default=math.inf)
        for start in range(best, len(costs) - 1)
    ]
    return [max(0.0, each) for each in (*[mean] * best, *more)]


def _candidates(index: int, context: int, gains: Sequence[float], aims_at_tpot: bool) -> list[_Candidate]:
    """The proposed tokens of a request. For its time per token, the first ones count most: by 1 / (output tokens of the
    step) with it and without it."""
    candidates, expected = [], 1.0
    for place, gain in enumerate(gains, start=1):
        worth = 1 / expected - 1 / (expected + gain) if aims_at_tpot else gain
        candidates.append(_Candidate(gain, index, context + place, worth))
        expected += gain
    return candidates


def _counts_upto(most: int, plain: int) -> list[int]:
    """Numbers of drafted tokens that are compared: those that make steps of few sizes, because each size is recorded
    before it is replayed; all of them if these are too few for the next size. plain: decodes without drafts."""
    return [size - plain for size in sizes_between(plain + 1, plain + most)] or [most]
