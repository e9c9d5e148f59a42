"""Starts speculation, if the recipe asks for it and the model allows it."""

from __future__ import annotations

from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.config import Config
from ulysses_infer.config.speculation import DRAFT_MODEL
from ulysses_infer.engine.policy_control import PolicyControl
from ulysses_infer.engine.profile_key import assumed
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.requests import RequestTable
from ulysses_infer.engine.speculation.draft_model import DraftModelProposer
from ulysses_infer.engine.speculation.draft_times import DraftTimes
from ulysses_infer.engine.speculation.drafted_texts import DraftedTexts
from ulysses_infer.engine.speculation.head_proposer import HeadProposer
from ulysses_infer.engine.speculation.speculation import Speculation
from ulysses_infer.engine.speculation.step_times import StepTimes
from ulysses_infer.errors import ConfigError
from ulysses_infer.worker.channel import DRAFT
from ulysses_infer.worker.drafting.draft_model import DraftModel
from ulysses_infer.worker.drafting.head_drafter import HeadDrafter
from ulysses_infer.worker.rank import Rank
from ulysses_infer.worker.transfer import DeviceToHostCopy


def start_speculation(
    config: Config, rank: Rank, requests: RequestTable, policies: PolicyControl
) -> Speculation | None:
    """Speculation as in `config`; None without it. Raises `ConfigError` if there is no room for recurrent states to go
    back to."""
    if not config.speculation.is_enabled:
        return None
    worker, modes = rank.worker, config.parallel.available_modes
    if worker.states is not None and not worker.states.num_snapshots:
        raise ConfigError(
            f"speculation.method = {config.speculation.method!r}: model type "
            f"{worker.model.injection.config.model_type!r} has recurrent layers, and there is no slot for their states "
            "before drafted tokens; raise cache.state_snapshots or cache.memory_bytes, or use none"
        )
    times = StepTimes(modes, assumed(worker, modes), lambda: policies.policy)
    speculation = Speculation(
        config.speculation,
        lambda request: requests.sequences[request.index][1].row.grammar,
        times,
        config.scheduler.max_num_batched_tokens,
        _make_draft_model_proposer(config, rank, requests)
        if config.speculation.method == DRAFT_MODEL
        else _head_proposer(config, rank),
        runs_ahead=bool(config.scheduler.async_scheduling),
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


def _make_draft_model_proposer(config: Config, rank: Rank, requests: RequestTable) -> DraftModelProposer:
    drafter, may_replace = rank.worker.drafter, config.speculation.acceptance == "rejection"
    assert isinstance(drafter, DraftModel)
    worker, cache = drafter.worker, drafter.worker.cache
    modes = list(worker.groups.by_mode)
    pools = BlockPools(
        cache.blocks_of_groups, cache.shape.block_size, config.cache.enable_prefix_caching, cache.groups.attention_spans
    )

    def seed_of(request: Request) -> int | None:
        row = requests.sequences[request.index][1].row
        # A drawn token that the grammar forbids would have to be verified all the same.
        return None if may_replace and row.grammar is not None else row.seed

    def send(plan: bytes) -> None:
        if worker.groups.layout.world_size > 1:
            rank.channel.send(DRAFT, plan)

    return DraftModelProposer(
        drafter,
        DraftedTexts(pools, config.scheduler.max_num_seqs),
        DraftTimes(modes, assumed(worker, modes)),
        seed_of,
        rank.worker.model.shape.vocab_size,
        may_replace,
        config.scheduler.max_num_batched_tokens,
        send,
    )
