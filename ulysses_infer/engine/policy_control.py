"""Changes of policy while the engine runs, and the calibration that the adaptive policy needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ulysses_infer.config import Config, PolicyConfig
from ulysses_infer.engine.calibration import Calibration
from ulysses_infer.engine.policies import AdaptivePolicy, Policy, make_policy
from ulysses_infer.engine.policies.start import initialize_policy, keep_profile
from ulysses_infer.engine.requests import RequestTable
from ulysses_infer.engine.scheduler import Scheduler
from ulysses_infer.engine.sleep import SleepState
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.worker.rank import Rank


class PolicyControl:
    """Holds the current policy of rank 0."""

    def __init__(
        self, config: Config, rank: Rank, scheduler: Scheduler, requests: RequestTable, sleep: SleepState
    ) -> None:
        self._config, self._rank, self._scheduler = config, rank, scheduler
        self._requests, self._sleep = requests, sleep
        self.policy: Policy = self._make_policy(config.policy)

    def set_policy(self, settings: PolicyConfig) -> None:
        """Replace the policy, from the next step on. Raises `ConfigError`."""
        self.policy = self._make_policy(settings)
        self.prepare()

    def _make_policy(self, settings: PolicyConfig) -> Policy:
        parallel = self._config.parallel
        policy = make_policy(settings, parallel.available_modes, parallel.base, parallel.layout.shift)
        if isinstance(policy, AdaptivePolicy):
            initialize_policy(policy, self._rank.worker)
        return policy

    def prepare(self) -> None:
        """Measure step times for a policy that has none. While requests run, it learns from their steps instead."""
        policy = self.policy
        if isinstance(policy, AdaptivePolicy) and policy.wants_calibration and not self._scheduler.has_unfinished:
            profile = self.calibrate(policy.config.calibration_seconds)
            policy.learn(profile, f"measured in {profile.notes['seconds']:g} s")
            keep_profile(profile, policy.config)

    def calibrate(self, seconds: float) -> Profile:
        """Measure the step times of every mode for about `seconds`. Raises `RequestError` while requests run."""
        with self.calibration() as calibration:
            return calibration.run(seconds)

    @contextmanager
    def calibration(self) -> Iterator[Calibration]:
        """Runs synthetic steps. Raises `RequestError` while requests run."""
        self._requests.check_idle("calibrating")
        self._sleep.check_awake()
        calibration = Calibration(
            self._rank.worker,
            self._rank.channel,
            self._scheduler.allocator,
            self._config.scheduler,
            self._config.parallel.available_modes,
            self._requests.take_forgotten(),
        )
        yield calibration
        self._requests.add_forgotten(calibration.dropped)
