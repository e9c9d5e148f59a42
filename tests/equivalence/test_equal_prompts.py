"""Equal prompts that are admitted to one step: all but the first start after the blocks that this very step fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence import test_compressed_keys, test_latent_families, test_selected_keys
from tests.equivalence.cases import BLOCK_SIZE, CROWD, TOLERANCE, ModeShuffle
from tests.equivalence.families import tiny_config
from tests.equivalence.swiftkv import make_swiftkv_reference
from tests.equivalence.tiny_models import NEW_TOKENS, Reference, make_checkpoint, make_prompts, make_reference
from tests.equivalence.unequal import make_unequal

pytestmark = pytest.mark.distributed

COUNT = 4  # of equal prompts
PROFILE = replace(CROWD, max_num_batched_tokens=64, max_num_seqs=8)
LENGTHS = (23,)
MODELS: dict[str, Callable[[Path], Any]] = {
    "llama": lambda folder: make_checkpoint(tiny_config("llama"), folder),
    "windows": lambda folder: make_unequal("mimo_v2_flash", folder),
    "latents": lambda folder: make_checkpoint(
        test_latent_families.config_of(next(iter(test_latent_families.MODELS))), folder
    ),
    "selected keys": lambda folder: test_selected_keys.make_indexed_checkpoint(
        next(iter(test_selected_keys.MODELS)), folder
    ),
    "compressed keys": lambda folder: test_compressed_keys.make_compressed("short and long", folder),
}


def reference_of(name: str, folder: Path) -> Reference:
    if name == "swiftkv":
        return make_swiftkv_reference(folder)
    return make_reference(MODELS[name](folder), folder, make_prompts(lengths=LENGTHS))


@dataclass
class Shared:
    """What a rank gave for COUNT equal prompts."""

    tokens: list[list[int]]
    logprobs: list[list[float]]  # of the generated tokens
    prefix_hits: int
    first_step: int  # tokens; known to rank 0


def run_equal(folder: Path, base: tuple[int, int], prompt: list[int]) -> Shared:
    """On every rank: COUNT equal prompts at once, in random modes."""
    from ulysses_infer import SamplingParams, init_inference

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    sizes: list[int] = []
    with init_inference(str(folder), **PROFILE.overrides(base)) as engine:
        modes = ModeShuffle(engine.config.parallel.available_modes)

        def choose(batch: Any) -> Any:
            sizes.append(batch.num_tokens)
            return modes(batch)

        brain: Any = engine._engine  # None on the ranks that follow
        if brain is not None:
            brain.choose_mode = choose
        completions = [output.outputs[0] for output in engine.generate([prompt] * COUNT, params)]
        hits = engine.stats()["prefix_cache_hits"]
    tokens = [completion.token_ids for completion in completions]
    logprobs = [
        [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs or [], strict=True)]
        for completion in completions
    ]
    return Shared(tokens, logprobs, hits, sizes[0] if sizes else 0)


def cases() -> list[Any]:
    """Every model on two ranks; llama also on one rank, and thoroughly all on other bases."""
    return [
        pytest.param(name, base, marks=[] if base == (2, 1) or name == "llama" else [pytest.mark.thorough])
        for name in (*MODELS, "swiftkv")
        for base in ((2, 1), (1, 1), (1, 2), (2, 2))
    ]


@pytest.mark.parametrize(("name", "base"), cases())
def test_equal_prompts_share_the_blocks_of_their_first_step(
    name: str, base: tuple[int, int], rank_pool: Any, tmp_path: Path
) -> None:
    reference = reference_of(name, tmp_path)
    chosen = max(range(len(reference.prompts)), key=lambda number: len(reference.prompts[number]))
    prompt = reference.prompts[chosen]
    outcomes = rank_pool(base[0] * base[1]).run(run_equal, reference.folder, base, prompt)
    cached = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    for outcome in outcomes:
        assert outcome.tokens == [reference.tokens[chosen]] * COUNT
        for logprobs in outcome.logprobs:
            assert logprobs == pytest.approx(reference.logprobs[chosen][-NEW_TOKENS:], abs=TOLERANCE)
        assert outcome.prefix_hits == (COUNT - 1) * cached
    assert outcomes[0].first_step == len(prompt) + (COUNT - 1) * (len(prompt) - cached)
