"""Predicted times of steps in the mode that the current policy would choose for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.policies import AdaptivePolicy, Policy
from ulysses_infer.engine.speculation.draft_planner import Prediction
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import Measurement, StepTimeModel
from ulysses_infer.step_time.step_shape import StepShape

PLAIN_STEPS_PER_OBSERVED = 4
"""Steps without drafts are many and alike. Learning from each would hold up the next one by 4 % in a small model."""


class StepTimes:
    """The adaptive policy's step times or, under other policies, a model of their own that learns from every step."""

    def __init__(self, modes: Sequence[Mode], assumed: Iterable[Measurement], policy: Callable[[], Policy]) -> None:
        """assumed: estimates until steps are measured. policy: the current one, which may be replaced."""
        self._policy = policy
        self._own = StepTimeModel(modes)
        self._own.learn(assumed, assumed=True)
        self._plain_steps = 0

    def predict(self, shape: StepShape) -> Prediction:
        """The time of a step in the fastest mode that the policy may choose for it."""
        policy = self._policy()
        model = policy.model if isinstance(policy, AdaptivePolicy) else self._own
        times = dict(zip(model.modes, model.predict(shape), strict=True))
        mode = min(policy.candidates(shape.num_tokens), key=times.__getitem__)
        return Prediction(mode, times[mode], model.is_measured(mode, shape))

    @property
    def aims_at_tpot(self) -> bool:
        """Whether the policy has a target for the time per output token."""
        policy = self._policy()
        return isinstance(policy, AdaptivePolicy) and policy.config.target_tpot_ms is not None

    def observe(self, batch: Batch, mode: Mode, seconds: float) -> None:
        """Learn from a step with drafts, and from one of `PLAIN_STEPS_PER_OBSERVED` without."""
        if isinstance(self._policy(), AdaptivePolicy):
            return
        if not any(item.drafts for item in batch.scheduled):
            self._plain_steps += 1
            if self._plain_steps % PLAIN_STEPS_PER_OBSERVED:
                return
        self._own.observe(mode, batch.shape, seconds)
