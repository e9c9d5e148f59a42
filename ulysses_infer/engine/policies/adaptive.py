"""The adaptive policy: chooses the mode with the lowest predicted step time."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ulysses_infer.config import PolicyConfig
from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.policies.chunking import ChunkSizer
from ulysses_infer.engine.policies.policy import Decision, Policy
from ulysses_infer.engine.request import Request
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.hysteresis import SwitchHysteresis
from ulysses_infer.step_time.model import Measurement, StepTimeModel
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.step_time.regret import RegretTracker
from ulysses_infer.step_time.step_shape import StepShape

WORTH_TRYING = 2.0  # an unmeasured mode is not tried if its prediction exceeds the best one's by this factor
FASTEST, EXPLORED, TRIED, ONLY = "predicted fastest", "explored", "tried, not measured yet", "the only mode loaded"
KEPT = "kept, for a change of mode costs more than staying has lost"


class AdaptivePolicy(Policy):
    """Predicts the time of each step in every loaded mode and takes the shortest, minding what a change costs.

    It starts from measured steps (`learn`) and refines what it knows with every step that runs. Without measurements
    it starts from times that the model's sizes suggest (`assume`), and tries a mode once for every kind of step in
    which it may be good. `policy.exploration` of the steps run in another mode than the best, to keep it honest.
    """

    name = "adaptive"

    def __init__(self, modes: Sequence[Mode], config: PolicyConfig, seed: int = 0) -> None:
        self.modes, self.config = tuple(modes), config
        self.model = StepTimeModel(modes)
        self.is_calibrated = False
        """Whether it started from measured steps."""
        self._origin = "nothing"
        self._random = random.Random(seed)
        self._regret = RegretTracker(self.model)
        self._chunks = ChunkSizer(_seconds(config.target_tpot_ms), _seconds(config.target_ttft_ms), self._fastest)
        self._hysteresis = SwitchHysteresis()
        self._shape = StepShape.of([], [])

    # -- initial step times ------------------------------------------------------------------------------------

    def learn(self, profile: Profile, origin: str) -> None:
        """Start from measured steps; `origin` says where they come from."""
        self.model.learn(profile.measurements)
        self._hysteresis = SwitchHysteresis(profile.switch_seconds)
        self.is_calibrated, self._origin = True, origin

    def assume(self, measurements: Iterable[Measurement]) -> None:
        """Start from estimated steps."""
        self.model.learn(measurements, assumed=True)
        self._origin = "the sizes of the model, until steps are measured"

    @property
    def wants_calibration(self) -> bool:
        """Whether measured steps would help: not with a single mode and no latency target."""
        needed = len(self.modes) > 1 or self.config.target_tpot_ms is not None
        return needed and not self.is_calibrated and self.config.calibration_seconds > 0

    # -- every step --------------------------------------------------------------------------------------------

    def prefill_limit(self, running: Sequence[Request], waiting: Request | None) -> int | None:
        """The prefill limit that the latency targets imply, if there are any."""
        return self._chunks.limit(running, waiting)

    def decide(self, batch: Batch) -> Decision:
        """The mode with the shortest predicted time, unless another one is due to be tried."""
        self._shape = shape = batch.shape
        times = dict(zip(self.modes, self.model.predict(shape), strict=True))
        mode, reason = self._pick(shape, times)
        return Decision(mode, f"{reason} ({shape})", tuple(times.items()))

    def candidates(self, num_tokens: int) -> Sequence[Mode]:
        """Every mode."""
        return self.modes

    def _pick(self, shape: StepShape, times: Mapping[Mode, float]) -> tuple[Mode, str]:
        if len(self.modes) == 1:
            return self.modes[0], ONLY
        best = min(times, key=times.__getitem__)
        if self.config.exploration and self._random.random() < self.config.exploration:
            return self._random.choice([mode for mode in self.modes if mode != best]), EXPLORED
        if not self.is_calibrated:
            for mode, seconds in times.items():
                if seconds < WORTH_TRYING * times[best] and not self.model.is_measured(mode, shape):
                    return mode, TRIED
        mode = self._hysteresis.choose(times)
        return mode, FASTEST if mode == best else KEPT

    def observe(self, batch: Batch, decision: Decision, seconds: float) -> None:
        """Learn from the step and count it."""
        self._regret.count(self._shape, decision.mode, dict(decision.predicted), seconds)
        self.model.observe(decision.mode, self._shape, seconds)

    def _fastest(self, shape: StepShape) -> float:
        return min(self.model.predict(shape))

    # -- description -------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Name, targets, exploration, and the origin of the step times."""
        settings = {"exploration": self.config.exploration} if self.config.exploration else {}
        for name in ("target_tpot_ms", "target_ttft_ms"):
            if getattr(self.config, name) is not None:
                settings[name] = getattr(self.config, name)
        return {"name": self.name, **settings, "profile": self._origin}

    def stats(self) -> dict[str, Any]:
        """Steps, prediction error, regret, explored steps, and how often the machine's speed has changed."""
        return {**self._regret.stats(), "speed_changes": self.model.drift.changes}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
