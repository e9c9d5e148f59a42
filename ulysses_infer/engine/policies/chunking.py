"""Limits prefill chunks so that decodes in the same step meet their latency target."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.engine.request import Request
from ulysses_infer.step_time.step_shape import StepShape

MIN_CHUNK = 16
"""Minimum progress of prompts per step, whatever it costs, so that none waits forever."""
MARGIN = 0.9
"""Steps are planned to use this share of the available time, because predictions err and a gap is longer than a step.
"""

FastestStep = Callable[[StepShape], float]
"""Predicted seconds of a step in its fastest mode."""


class ChunkSizer:
    """Largest prefill chunk that keeps the targets; `target_tpot`, `target_ttft` in seconds, None for none.

    Every step is planned to end within `target_tpot`. When the first prompt in line would then miss `target_ttft`, a
    step may use the slack of the decodes, which have been faster than their target so far: their mean time per token
    still meets it, at the cost of one longer gap. Source of chunks sized by the decodes beside them: Agrawal et
    al., "Sarathi-Serve", OSDI 2024.
    """

    def __init__(
        self,
        target_tpot: float | None,
        target_ttft: float | None,
        fastest: FastestStep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target_tpot, self._target_ttft = target_tpot, target_ttft
        self._fastest, self._clock = fastest, clock

    def limit(self, running: Sequence[Request], waiting: Request | None) -> int | None:
        """Most prompt tokens of the next step; None: no limit."""
        if self._target_tpot is None:
            return None
        decodes = [request for request in running if _is_decoding(request)]
        prompt = next((request for request in running if not _is_decoding(request)), waiting)
        if not decodes or prompt is None:
            return None
        chunk = self._largest(decodes, prompt, self._target_tpot * MARGIN)
        if chunk < prompt.num_tokens_left and self._is_late(prompt, chunk):
            slack = self._time_slack(decodes, self._target_tpot)
            chunk = max(chunk, self._largest(decodes, prompt, slack * MARGIN))
        return chunk

    def _largest(self, decodes: Sequence[Request], prompt: Request, seconds: float) -> int:
        """The largest chunk whose step is predicted to end within `seconds`, found by bisection."""
        contexts = [request.num_tokens for request in decodes]
        start = prompt.num_computed_tokens

        def fits(chunk: int) -> bool:
            return self._fastest(StepShape.of(contexts, [(start, chunk)])) <= seconds

        most = prompt.num_tokens_left
        if most <= MIN_CHUNK or fits(most):
            return max(most, MIN_CHUNK)
        low, high = MIN_CHUNK, most
        while high - low > MIN_CHUNK:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _is_late(self, prompt: Request, chunk: int) -> bool:
        """Whether chunks of this size, one per `target_tpot`, would miss the target of the first token."""
        if self._target_ttft is None or self._target_tpot is None or prompt.first_token_time is not None:
            return False
        steps = ceil_div(prompt.num_tokens_left, chunk)
        return self._clock() + steps * self._target_tpot > prompt.arrival_time + self._target_ttft

    def _time_slack(self, decodes: Sequence[Request], target: float) -> float:
        """How long a step may take so that the mean time per token of every decode stays within `target`."""
        now = self._clock()
        since = [now if request.first_token_time is None else request.first_token_time for request in decodes]
        return min(
            target * request.num_output_tokens - (now - first) for request, first in zip(decodes, since, strict=True)
        )


def _is_decoding(request: Request) -> bool:
    return request.num_output_tokens + request.num_placeholders > 0 and request.num_tokens_left == 1
