"""The token counts at which another mode becomes the fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import StepTimeModel
from ulysses_infer.step_time.step_shape import StepShape

NOTEWORTHY = 1.01  # a mode must be faster by more than this to take over
STEPS_PER_DOUBLING = 8


class Stretch(NamedTuple):
    """From this many tokens on, up to the next stretch, this mode is the fastest."""

    tokens: int
    mode: Mode


def fastest_by_tokens(model: StepTimeModel, step_of: Callable[[int], StepShape], most: int) -> list[Stretch]:
    """The fastest mode of the steps `step_of(tokens)`, for 1 to `most` tokens."""
    stretches: list[Stretch] = []
    for tokens in _counts(most):
        times = dict(zip(model.modes, model.predict(step_of(tokens)), strict=True))
        best = min(times, key=times.__getitem__)
        if not stretches or times[stretches[-1].mode] > NOTEWORTHY * times[best]:
            stretches.append(Stretch(tokens, best))
    return stretches


def _counts(most: int) -> list[int]:
    """1 to `most`, in geometric steps."""
    steps = range(STEPS_PER_DOUBLING * most.bit_length())
    grown = {round(2 ** (step / STEPS_PER_DOUBLING)) for step in steps} | {most}
    return sorted(count for count in grown if count <= most)
