"""A cache so small that prefixes are evicted and come back from the tier below it: no output changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import TIGHT, TOLERANCE, ModeShuffle, Profile, with_snapshots
from tests.equivalence.families import tiny_config
from tests.equivalence.test_compressed_keys import make_compressed
from tests.equivalence.tiny_models import make_checkpoint, make_prompts, make_reference

pytestmark = pytest.mark.distributed

NEW_TOKENS = 6
ENOUGH = 1 << 20
"""Bytes of host memory for all prompts."""
LENGTHS = (33, 21, 41, 30, 37)
FP8_TOLERANCE = 2e-2
"""Sums in another order may round to another value of a cache with three bits of mantissa."""
PRESSED = replace(TIGHT, num_blocks=16, max_num_seqs=3)


@dataclass
class Outcome:
    """Tokens and log-probabilities of the prompts in the second round, and the engine's counters."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    stats: dict[str, Any]


def run_twice(folder: Path, base: tuple[int, int], profile: Profile, prompts: list[list[int]]) -> Outcome:
    """On every rank: all prompts, then all again with prefixes from the cache; random modes at every step."""
    from ulysses_infer import SamplingParams, init_inference

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    with init_inference(str(folder), **profile.overrides(base)) as engine:
        brain: Any = engine._engine  # None on the ranks that follow
        if brain is not None:
            brain.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
        engine.generate(prompts, params)
        outputs = [output.outputs[0] for output in engine.generate(prompts, params)]
        stats = engine.stats()
        if brain is not None:
            brain.scheduler.allocator.assert_idle()
    logprobs = [
        [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        for output in outputs
    ]
    return Outcome([output.token_ids for output in outputs], logprobs, stats)


def with_tier(profile: Profile, host_bytes: int, folder: Path) -> Profile:
    """The profile with a tier of host memory or, if there is little, of disk space too."""
    settings: dict[str, Any] = {"cache.offload_host_bytes": host_bytes}
    if host_bytes != ENOUGH:
        settings |= {"cache.offload_disk_bytes": 4 << 20, "cache.offload_disk_folder": str(folder)}
    return replace(profile, settings={**profile.settings, **settings})


def check_same(outcomes: list[Outcome], tokens: list[list[int]], logprobs: list[list[float]], tolerance: float) -> None:
    """Assert that all ranks have these tokens and log-probabilities, and that the tier had prefixes."""
    first = outcomes[0]
    assert all(other.tokens == first.tokens for other in outcomes[1:])
    assert first.tokens == tokens
    for mine, expected in zip(first.logprobs, logprobs, strict=True):
        assert mine == pytest.approx(expected, abs=tolerance)
    assert first.stats["external_prefix_cache_hits"] > 0
    assert first.stats["kv_offload_load_bytes"] > 0


def make_model(kind: str, folder: Path) -> Any:
    if kind == "deepseek_v4":
        return make_compressed("short and long", folder)
    return make_checkpoint(next(tiny_configs(kind)) if kind == "qwen3_next" else tiny_config(kind), folder)


CASES = [
    ("llama", (2, 1), {}, ENOUGH),
    *(
        pytest.param(*case, marks=pytest.mark.thorough)
        for case in (
            ("llama", (1, 1), {}, 1 << 14),
            ("llama", (2, 2), {"rank_order": "tp_inner"}, 1 << 13),
            ("llama", (8, 1), {}, ENOUGH),
            ("deepseek_v3", (2, 1), {"cache.latent": True}, 1 << 13),
            ("gemma3_text", (2, 1), {}, ENOUGH),
            ("gemma3_text", (2, 1), {"cache.dtype": "fp8"}, 1 << 13),
            ("mistral", (1, 2), {}, 1 << 13),
            ("gpt_oss", (2, 1), {}, ENOUGH),
            ("qwen3_next", (2, 1), {"cache.state_snapshots": 3}, 1 << 15),
            ("deepseek_v4", (2, 1), {}, 1 << 15),
        )
    ),
]


@pytest.mark.parametrize(("kind", "base", "changes", "host_bytes"), CASES)
def test_prefixes_come_back_in_every_layout(
    kind: str, base: tuple[int, int], changes: dict[str, Any], host_bytes: int, rank_pool: Any, tmp_path: Path
) -> None:
    """Against transformers; with a lossy cache, against an engine whose cache is large enough for all prompts."""
    model = make_model(kind, tmp_path)
    prompts = make_prompts(lengths=LENGTHS)
    order = changes.get("rank_order", "sp_inner")
    settings = {key: value for key, value in changes.items() if key != "rank_order"}
    profile = with_snapshots(replace(PRESSED, settings=settings, rank_order=order), tmp_path)
    pool = rank_pool(base[0] * base[1])
    outcomes = pool.run(run_twice, tmp_path, base, with_tier(profile, host_bytes, tmp_path), prompts)
    if "cache.dtype" in changes:
        plain = pool.run(run_twice, tmp_path, base, replace(profile, num_blocks=100), prompts)[0]
        assert plain.stats["prefix_cache_hits"] > 0
        check_same(outcomes, plain.tokens, plain.logprobs, FP8_TOLERANCE)
    else:
        reference = make_reference(model, tmp_path, prompts, NEW_TOKENS)
        expected = [each[-NEW_TOKENS:] for each in reference.logprobs]
        check_same(outcomes, reference.tokens, expected, TOLERANCE)
    assert (outcomes[0].stats["kv_offload_disk_store_bytes"] > 0) == (host_bytes != ENOUGH)
