"""How long the steps of a draft model take, and the mode that suits each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import Measurement, StepTimeModel
from ulysses_infer.step_time.step_shape import StepShape

CATCH_UP_STEPS = 32  # the time to compute a text that the draft model has not seen is spread over as many steps


class DraftTimes:
    """Step times of the draft model: estimates first, then what was measured."""

    def __init__(self, modes: Sequence[Mode], assumed: Iterable[Measurement]) -> None:
        self._model = StepTimeModel(modes)
        self._model.learn(assumed, assumed=True)

    def fastest(self, shape: StepShape) -> Mode:
        """The mode for a step."""
        return min(zip(self._model.predict(shape), self._model.modes, strict=True))[1]

    def seconds(self, shape: StepShape) -> float:
        """The time of a step in its mode."""
        return min(self._model.predict(shape))

    def observe(self, steps: Sequence[tuple[Mode, StepShape]], seconds: float) -> None:
        """Learn from the time that steps took together: each is taken to have its share of the predicted time."""
        expected = [self._model.predict(shape)[self._model.modes.index(mode)] for mode, shape in steps]
        for (mode, shape), each in zip(steps, expected, strict=True):
            self._model.observe(mode, shape, seconds * each / sum(expected))

    def of_drafts(self, contexts: Sequence[int], missing: int, count: int) -> float:
        """The time to draft `count` tokens of each request. contexts: their known tokens; missing: how many of these
        the draft model has not seen, the last one of each aside."""
        if not count or not contexts:
            return 0.0
        step = self.seconds(StepShape.of(list(contexts), []))
        catch_up = self.seconds(StepShape.of([], [(0, missing)])) / CATCH_UP_STEPS if missing > 0 else 0.0
        return count * step + catch_up
