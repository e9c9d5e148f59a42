"""Starts speculation, if the recipe asks for it and the model allows it."""

from __future__ import annotations

from ulysses_infer.config import Config
from ulysses_infer.engine.policy_control import PolicyControl
from ulysses_infer.engine.profile_key import assumed
from ulysses_infer.engine.requests import RequestTable
from ulysses_infer.engine.speculation.speculation import Speculation
from ulysses_infer.engine.speculation.step_times import StepTimes
from ulysses_infer.errors import ConfigError
from ulysses_infer.worker.rank import Rank


def start_speculation(
    config: Config, rank: Rank, requests: RequestTable, policies: PolicyControl
) -> Speculation | None:
    """Speculation as in `config`; None without it. Raises `ConfigError` for a model whose states cannot go back."""
    if not config.speculation.is_enabled:
        return None
    worker, modes = rank.worker, config.parallel.available_modes
    if worker.states is not None:
        raise ConfigError(
            f"speculation.method = {config.speculation.method!r}: model type "
            f"{worker.model.injection.config.model_type!r} has recurrent layers, whose states cannot go back to the "
            "accepted tokens; use none"
        )
    if worker.cache.shape.entries:
        raise ConfigError(
            f"speculation.method = {config.speculation.method!r}: model type "
            f"{worker.model.injection.config.model_type!r} caches entries of several tokens, which speculation has not "
            "been verified with; use none"
        )
    times = StepTimes(modes, assumed(worker, modes), lambda: policies.policy)
    speculation = Speculation(config.speculation, requests.sequences, times, config.scheduler.max_num_batched_tokens)
    requests.on_end = speculation.forget
    return speculation
