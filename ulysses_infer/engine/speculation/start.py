"""Starts speculation, if the recipe asks for it and the model allows it."""

from __future__ import annotations

from ulysses_infer.config import Config
from ulysses_infer.engine.policy_control import PolicyControl
from ulysses_infer.engine.profile_key import assumed
from ulysses_infer.engine.requests import RequestTable
from ulysses_infer.engine.speculation.head_proposer import HeadProposer
from ulysses_infer.engine.speculation.speculation import Speculation
from ulysses_infer.engine.speculation.step_times import StepTimes
from ulysses_infer.errors import ConfigError
from ulysses_infer.worker.channel import DRAFT
from ulysses_infer.worker.drafting.head_drafter import HeadDrafter
from ulysses_infer.worker.rank import Rank
from ulysses_infer.worker.transfer import DeviceToHostCopy


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
    speculation = Speculation(
        config.speculation,
        lambda request: requests.sequences[request.index][1].row.grammar,
        times,
        config.scheduler.max_num_batched_tokens,
        _head_proposer(config, rank),
    )
    requests.on_end = speculation.forget
    return speculation


def _head_proposer(config: Config, rank: Rank) -> HeadProposer | None:
    """The proposer of a method with heads; None for the others."""
    if not isinstance(drafter := rank.worker.drafter, HeadDrafter):
        return None

    def send(payload: bytes) -> list[DeviceToHostCopy]:
        rank.channel.send(DRAFT, payload)
        return drafter.draft(payload)

    return HeadProposer(send, config.speculation.max_drafted)
