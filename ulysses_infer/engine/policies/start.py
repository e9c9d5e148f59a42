"""The initial step times of an adaptive policy: a stored profile, or estimates from the model's sizes."""

from __future__ import annotations

import logging

from ulysses_infer.config import PolicyConfig
from ulysses_infer.engine.policies import AdaptivePolicy
from ulysses_infer.engine.profile_key import assumed, profile_key
from ulysses_infer.errors import ConfigError
from ulysses_infer.step_time.profile import Profile, cached_path, read_profile
from ulysses_infer.worker.worker import Worker

logger = logging.getLogger(__name__)


def initialize_policy(policy: AdaptivePolicy, worker: Worker) -> None:
    """Give the policy a stored profile if one is valid here, else estimates.

    Raises `ConfigError` if `policy.profile` names a file that is not valid here.
    """
    policy.assume(assumed(worker, policy.modes))
    if policy.config.profile is None:
        return
    profile, why = read_profile(policy.config.profile, profile_key(worker, policy.modes))
    if profile is not None:
        policy.learn(profile, why)
        return
    seconds = policy.config.calibration_seconds
    remedy = f"measuring them, for at most {seconds:g} s" if policy.wants_calibration else "learning from traffic"
    level = logging.WARNING if cached_path(profile_key(worker, policy.modes)).is_file() else logging.INFO
    logger.log(level, "policy adaptive: %s; %s", why, remedy)


def keep_profile(profile: Profile, config: PolicyConfig) -> None:
    """Store a new profile for the next start, if `policy.profile` is auto."""
    if config.profile != "auto":
        return
    try:
        profile.save(cached_path(profile.key))
    except ConfigError as error:  # a read-only home must not stop the engine
        logger.warning("%s; it will be measured again at the next start", error)
