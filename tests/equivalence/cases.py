"""One engine on the ranks of a pool under a demanding load, and its outputs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.tiny_models import NEW_TOKENS

TOLERANCE = 1e-4
BLOCK_SIZE = 4
MAX_MODEL_LEN = 128  # of the tiny models
ALL_RECURRENT = ("rwkv", "xlstm")  # their configs do not say what their layers are


@dataclass(frozen=True)
class Profile:
    """How the engine is run; none of this may change a token."""

    name: str
    rank_order: str = "sp_inner"
    max_num_batched_tokens: int = 16
    max_num_seqs: int = 4
    chunked: bool = True
    async_scheduling: bool = False
    prefix_caching: bool = True
    num_blocks: int = 64
    arrival_every: int = 0  # steps between arrivals; 0: all at once
    settings: dict[str, Any] = field(default_factory=dict)

    def overrides(self, base: tuple[int, int]) -> dict[str, Any]:
        """Keyword arguments of `init_inference`, with every mode of the base loaded."""
        sp, tp = base
        modes = [[s, sp * tp // s] for s in range(1, sp + 1) if sp % s == 0]
        return {
            "parallel": {"sp": sp, "tp": tp, "modes": modes, "rank_order": self.rank_order},
            "model.max_model_len": min(MAX_MODEL_LEN, 4 * self.num_blocks),
            "cache": {
                "num_blocks": self.num_blocks,
                "block_size": BLOCK_SIZE,
                "enable_prefix_caching": self.prefix_caching,
            },
            "scheduler": {
                "max_num_batched_tokens": self.max_num_batched_tokens,
                "max_num_seqs": self.max_num_seqs,
                "enable_chunked_prefill": self.chunked,
                "async_scheduling": self.async_scheduling,
            },
            "runtime": {"threads_per_rank": 1, "device": "cpu", "debug": True},
            **self.settings,
        }


def with_snapshots(profile: Profile, folder: Path) -> Profile:
    """The profile with snapshots of states at every block, if the checkpoint in `folder` has recurrent layers."""
    from ulysses_infer.model.injection.attention import HYBRID_KINDS
    from ulysses_infer.model.model import read_config

    config = read_config(folder).get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    has_states = bool(kinds & HYBRID_KINDS) or config.model_type in ALL_RECURRENT
    if not has_states or not profile.prefix_caching:
        return profile
    return replace(profile, settings={**profile.settings, "cache.state_snapshot_interval": BLOCK_SIZE})


CROWD = Profile("crowd", arrival_every=2)
WHOLE = Profile(
    "whole", chunked=False, async_scheduling=True, prefix_caching=False, max_num_batched_tokens=64, max_num_seqs=8
)
TIGHT = Profile("tight", async_scheduling=True, num_blocks=14, max_num_seqs=8)
INNER = replace(CROWD, name="inner", rank_order="tp_inner")


def bases(world_size: int) -> list[tuple[int, int]]:
    """Every `(sp, tp)` with sp * tp = W."""
    return [(world_size // tp, tp) for tp in range(1, world_size + 1) if world_size % tp == 0]


def layouts(turn: int) -> list[tuple[int, int]]:
    """The bases of case number `turn`: those that shift, which run every mode of 2 and 4 ranks, and one other."""
    return [(2, 1), (4, 1), (2, 2), ((1, 2), (1, 4), (1, 1))[turn % 3]]


@dataclass
class Outcome:
    """The outputs of an engine, and what happened during the run."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    again: list[list[int]]  # the same prompts once more, without log-probabilities
    num_preempted: int
    prefix_hits: int
    modes: set[str]
    weight_bytes: list[int]
    all_windows: bool = False  # whether no layer sees everything: then few blocks are enough (known to rank 0)


def run_case(folder: Path, base: tuple[int, int], profile: Profile, prompts: list[list[int]], new_tokens: int) -> Any:
    """On every rank: an engine over `folder`, random modes at every step; the `Outcome`, the same on all ranks."""
    from ulysses_infer import SamplingParams, init_inference

    scored = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    plain = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    arrivals = [profile.arrival_every * index for index in range(len(prompts))]
    with init_inference(str(folder), **profile.overrides(base)) as engine:
        modes, all_windows = ModeShuffle(engine.config.parallel.available_modes), False
        brain: Any = engine._engine  # None on the ranks that follow
        if brain is not None:
            brain.choose_mode = modes
        outputs = engine.generate(prompts, scored, arrival_steps=arrivals)
        again = engine.generate(prompts, plain)
        stats = engine.stats()
        if brain is not None:
            brain.scheduler.allocator.assert_idle()
            all_windows = brain.scheduler.allocator.attention_spans[0].is_limited
    return Outcome(
        tokens=[output.outputs[0].token_ids for output in outputs],
        logprobs=[all_logprobs(output) for output in outputs],
        again=[output.outputs[0].token_ids for output in again],
        num_preempted=modes.num_preempted,
        prefix_hits=stats["prefix_cache_hits"],
        modes=modes.used,
        weight_bytes=stats["weight_bytes_per_rank"],
        all_windows=all_windows,
    )


class ModeShuffle:
    """Rank 0's choice of modes, all of them in a new order each round, and a count of preemptions."""

    def __init__(self, modes: list[Any], seed: int = 0) -> None:
        self.modes, self.random = list(modes), random.Random(seed)
        self.pending: list[Any] = []
        self.used: set[str] = set()
        self.num_preempted = 0

    def __call__(self, batch: Any) -> Any:
        self.num_preempted += len(batch.preempted)
        if not self.pending:
            self.pending = self.random.sample(self.modes, len(self.modes))
        mode = self.pending.pop()
        self.used.add(str(mode))
        return mode


def all_logprobs(output: Any) -> list[float]:
    """The log-probability of every token of prompt and completion but the first."""
    token_ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    entries = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    return [entry[token].logprob for token, entry in zip(token_ids[1:], entries[1:], strict=True)]


def check_case(rank_pool: Any, reference: Any, base: tuple[int, int], profile: Profile) -> list[Outcome]:
    """Run the checkpoint of `reference` on ranks of the fixture `rank_pool`; assert its outputs in every mode.
    Returns what each rank gave."""
    ranks = rank_pool(base[0] * base[1])
    outcomes: list[Outcome] = ranks.run(run_case, reference.folder, base, profile, reference.prompts, NEW_TOKENS)
    check(outcomes, reference, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))
    return outcomes


def parameters(name: str, base: tuple[int, int], profile: Profile, is_default: bool) -> Any:
    """pytest's parameters of a case; it is thorough unless `is_default`."""
    marks = [] if is_default else [pytest.mark.thorough]
    return pytest.param(name, base, profile, marks=marks, id=f"{name}-sp{base[0]}xtp{base[1]}-{profile.name}")


def check(outcomes: list[Outcome], reference: Any, profile: Profile, num_modes: int) -> float:
    """Assert that rank 0 gave transformers' outputs and the other ranks the same. Returns the largest error."""
    first = outcomes[0]
    assert all(other.tokens == first.tokens and other.again == first.again for other in outcomes[1:])
    assert first.tokens == reference.tokens, "tokens differ"
    assert first.again == reference.tokens, "tokens differ in the second run"
    error = max(
        abs(ours - theirs)
        for mine, expected in zip(first.logprobs, reference.logprobs, strict=True)
        for ours, theirs in zip(mine, expected, strict=True)
    )
    assert error <= TOLERANCE, f"log-probabilities differ by {error:.2g}"
    assert len(first.modes) == num_modes
    is_tight = profile.name == TIGHT.name
    if not (is_tight and first.all_windows):
        assert (first.num_preempted > 0) == is_tight
    if not is_tight:  # there, blocks are evicted before they can be hit
        assert (first.prefix_hits > 0) == profile.prefix_caching
    return error
