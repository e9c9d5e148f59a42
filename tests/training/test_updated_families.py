"""New weights reach every kind of stored tensor: packed, merged, converted, tied, stacked for a GPU."""

from unittest import mock

import pytest

from tests.equivalence.cases import CROWD, ModeShuffle
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint, make_prompts, make_reference
from tests.selection import diagonal
from ulysses_infer import SamplingParams, init_inference

pytestmark = pytest.mark.distributed
FAMILIES = ["llama", "phi3", "qwen3_moe", "mixtral", "olmo2", "gpt2", "gemma2"]
PLACEMENTS = ["replicate", "expert", "width"]
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPTS = make_prompts(lengths=(2, 13, 21))


def change_weights(first, second, base, placement, stacked):
    """What an engine generates with the weights of one folder, then with those of the other; asleep in between."""
    overrides = CROWD.overrides(base)
    overrides["parallel"]["expert_placement"] = placement
    with (
        mock.patch("ulysses_infer.model.fusion.fuse.should_stack_weights", return_value=stacked),
        init_inference(first, **overrides) as engine,
    ):
        if engine.is_first:
            engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
        found = []
        for source, level in ((second, 1), (first, 2), (second, 2)):
            found.append([o.outputs[0].token_ids for o in engine.generate(PROMPTS, GREEDY)])
            engine.sleep(level)
            engine.update_weights(source)
            engine.wake_up()
        return [*found, [o.outputs[0].token_ids for o in engine.generate(PROMPTS, GREEDY)]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """`pairs(family)`: two folders of one shape, and what transformers generates with each."""
    made = {}

    def get(family):
        if family not in made:
            folders = [tmp_path_factory.mktemp(f"{family}{seed}") for seed in (0, 1)]
            models = [make_checkpoint(tiny_config(family), folder, seed) for seed, folder in enumerate(folders)]
            answers = [
                make_reference(m, f, PROMPTS, GREEDY.max_tokens).tokens for m, f in zip(models, folders, strict=True)
            ]
            made[family] = [str(folder) for folder in folders], answers
        return made[family]

    return get


@pytest.mark.parametrize(("base", "stacked", "family"), diagonal([(2, 1), (1, 2)], [False, True], FAMILIES))
def test_a_family_generates_by_its_new_weights(family, base, stacked, pairs, rank_pool):
    (first, second), (by_first, by_second) = pairs(family)
    for found in rank_pool(2).run(change_weights, first, second, base, "replicate", stacked):
        assert found == [by_first, by_second, by_first, by_second]


@pytest.mark.parametrize("placement", PLACEMENTS[1:])
def test_experts_change_where_they_are(placement, pairs, rank_pool):
    (first, second), (by_first, by_second) = pairs("qwen3_moe")
    for found in rank_pool(2).run(change_weights, first, second, (2, 1), placement, False):
        assert found == [by_first, by_second, by_first, by_second]
