"""The four models of the Shift Parallelism paper, thin and of two layers, on 8 ranks in the layouts of their recipes.

Heads, experts and all else that decides ownership are the real ones; widths are small enough for a test.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from docs.generate.tiny_configs import parts_of, shallow
from tests.equivalence.cases import CROWD, check, run_case
from tests.equivalence.tiny_models import VOCABULARY, Reference, make_checkpoint, make_prompts, make_reference
from tools.memory_table import read_config
from ulysses_infer.config import load_config

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
RECIPES = {
    "llama-3.3-70b": "llama-3.3-70b-fp8-8xh200",
    "qwen3-32b": "qwen3-32b-fp8-8xh200",
    "llama-4-scout-17b-16e": "llama-4-scout-17b-16e-8xh200",
    "qwen3-30b-a3b": "qwen3-30b-a3b-8xh200",
}
THIN = {
    "num_hidden_layers": 2,
    "hidden_size": 320,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "intermediate_size_mlp": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "attention_chunk_size": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LAYER_TYPES = {"llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}}
LENGTHS = (1, 9, 20)
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`shape(name)`: a thin checkpoint of one of the four, with transformers' answers."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make_checkpoint(thin(name), folder)
            made[name] = make_reference(model, folder, make_prompts(lengths=LENGTHS), NEW_TOKENS)
        return made[name]

    return get


def thin(name: str) -> Any:
    """The model's config with small widths and two layers; of Scout, with a small vision encoder too."""
    whole = read_config(ROOT / "configs" / "models" / f"{name}.json")
    real = whole.get_text_config(decoder=True)
    values = {key: value for key, value in real.to_dict().items() if key not in ("dtype", "layer_types", "moe_layers")}
    changes = {key: value for key, value in THIN.items() if key in values}
    text = type(real)(**{**values, **changes, **LAYER_TYPES.get(real.model_type, {})})
    for count in ("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts"):
        assert getattr(text, count, None) == getattr(real, count, None)
    towers = {part: shallow(config) for part, config in parts_of(whole).items() if config is not real}
    return text if whole is real else type(whole)(text_config=text, **towers)


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("llama-3.3-70b", "auto"),
        ("qwen3-32b", "auto"),
        ("llama-4-scout-17b-16e", "expert"),
        ("qwen3-30b-a3b", "width"),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                ("llama-4-scout-17b-16e", "replicate"),
                ("llama-4-scout-17b-16e", "width"),
                ("qwen3-30b-a3b", "replicate"),
                ("qwen3-30b-a3b", "expert"),
            )
        ),
    ],
)
def test_paper_shapes_are_correct_in_the_layout_of_their_recipe(
    name: str, placement: str, shape: Any, rank_pool: Any
) -> None:
    parallel = load_config(ROOT / "recipes" / f"{RECIPES[name]}.yaml").parallel
    base = parallel.sp, parallel.tp
    assert base[0] * base[1] == 8
    expected = shape(name)
    profile = replace(CROWD, settings={"parallel.expert_placement": placement})
    outcomes = rank_pool(8).run(run_case, expected.folder, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))
