"""Latents or heads in the cache: transformers' tokens and log-probabilities, whatever the mode of a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_kv_invariance import TOLERANCE, SlotRecorder, cached
from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check, layouts, run_case
from tests.equivalence.families import LATENT, SHAPE, tiny_config
from tests.equivalence.tiny_models import NEW_TOKENS, Reference, make_checkpoint, make_prompts, make_reference
from tests.tiny import settings

pytestmark = pytest.mark.distributed

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.5,
    "beta_fast": 32,
    "beta_slow": 1,
    "rope_theta": 10000.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2-no-q-lora": ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek_v3": ("deepseek_v3", {"rope_parameters": YARN}),
    "deepseek_v3-halves": ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None}),
    "minicpm3": ("minicpm3", {}),
    "youtu": ("youtu", {}),
}


def cases() -> list[Any]:
    """Every model on most bases, caching latents and heads; other options alternate. One case in seven by default."""
    chosen, turn = [], 0
    for number, model in enumerate(MODELS):
        for base in layouts(number):
            for latent in (True, False):
                turn += 1
                profile = (CROWD, WHOLE, TIGHT, INNER if base == (2, 2) else CROWD)[turn % 4]
                name = f"{model}-{'latent' if latent else 'heads'}-sp{base[0]}xtp{base[1]}-{profile.name}"
                marks = [] if latent and turn % 7 == 3 else [pytest.mark.thorough]
                chosen.append(pytest.param(model, base, latent, profile, id=name, marks=marks))
    return chosen


@pytest.fixture(scope="module")
def latent_reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny checkpoint of one of `MODELS` with transformers' answers."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = make_reference(make_checkpoint(config_of(name), folder), folder, make_prompts())
        return made[name]

    return get


def config_of(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    family, changes = MODELS[name]
    config = tiny_config(family) if family.startswith("deepseek") else CONFIG_MAPPING[family](**{**SHAPE, **LATENT})
    return type(config)(**{**config.to_dict(), **changes})


@pytest.mark.parametrize(("model", "base", "latent", "profile"), cases())
def test_latents_and_heads_give_what_transformers_gives(
    model: str, base: tuple[int, int], latent: bool, profile: Profile, rank_pool: Any, latent_reference: Any
) -> None:
    expected = latent_reference(model)
    folder: Path = expected.folder
    wanted = replace(profile, settings={"cache.latent": latent})
    outcomes = rank_pool(base[0] * base[1]).run(run_case, folder, base, wanted, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


def compare_modes(folder: str, sp: int, tp: int, prompts: list[list[int]]) -> tuple[float, torch.Tensor, Any]:
    """On a rank: the largest difference between modes, what layer 1 has cached of all tokens, and the cache's shape."""
    from ulysses_infer import init_inference

    changes = {"cache.latent": True, "cache.enable_prefix_caching": False, "scheduler.max_num_batched_tokens": 16}
    with init_inference(folder, **settings(sp, tp, **changes)) as engine:
        inner: Any = engine
        recorder = SlotRecorder(inner._rank.worker.tables)
        runs = [
            cached(engine, recorder, lambda _, mode=mode: mode, prompts)
            for mode in engine.config.parallel.available_modes
        ]
        cache = inner._rank.worker.cache
        held = {tensor.untyped_storage().data_ptr() for tensor in (*cache.keys, *cache.values)}
        assert len(held) == cache.shape.num_layers, "values are views of keys"
        shape, num_bytes = cache.shape, sum(keys.numel() * keys.element_size() for keys in cache.keys)
    assert num_bytes == cache.num_bytes
    (owners, first), difference = runs[0], 0.0
    for others, layers in runs[1:]:
        assert others == owners, "the same tokens were computed"
        for (found, _), (wanted, _) in zip(layers, first, strict=True):
            difference = max(difference, float((found - wanted).abs().max() / wanted.abs().max()))
    return difference, first[1][0].clone(), shape


@pytest.mark.parametrize(("sp", "tp"), [(2, 1), pytest.param(4, 1, marks=pytest.mark.thorough), (2, 2)])
def test_every_mode_and_every_rank_caches_the_same_latents(
    sp: int, tp: int, rank_pool: Any, latent_reference: Any
) -> None:
    folder = str(latent_reference("deepseek_v3").folder)
    results = rank_pool(sp * tp).run(compare_modes, folder, sp, tp, make_prompts(101, (1, 7, 21, 38)))
    difference, cached_by_first, shape = results[0]
    sizes = {(each.num_key_value_heads, each.key_width, each.value_width) for each in shape.own_layers}
    assert sizes == {(1, 24, 16)}
    assert float(cached_by_first.abs().mean()) > 0.1
    for difference, found, _ in results:
        assert difference <= TOLERANCE
        assert (found - cached_by_first).abs().max() <= TOLERANCE * cached_by_first.abs().max()
