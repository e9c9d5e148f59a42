"""Every recipe: it loads, and its layout suits the published shape of its model, without the weights.

The shapes are those of the models' config.json on the hub. Recipes named train_* belong to the training tool.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from ulysses_infer.config import load_config, refuse_unavailable
from ulysses_infer.model.layers.rotary import choose_max_model_len, max_supported_len
from ulysses_infer.model.loading.hf_overrides import overridden
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.online import OnlineInt8
from ulysses_infer.parallel.layout import Mode, check_mode, even_span, heads_fit, key_value_span

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.name.startswith("train_"))
PIECES = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "deploy")


@dataclass(frozen=True)
class Shape:
    """The published shape of a model."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    """Width of the dense MLP, or of one expert."""
    vocabulary: int
    positions: int
    """Longest context declared."""
    experts: int = 0
    weight_bytes: float = 0.0
    """Size of all weights as the recipe stores them."""


SHAPES = {
    "llama-3.3-70b-fp8-8xh200": Shape(8192, 80, 64, 8, 128, 28672, 128256, 131072, weight_bytes=72.7e9),
    "llama-3.3-70b-fp8-8xh100": Shape(8192, 80, 64, 8, 128, 28672, 128256, 131072, weight_bytes=72.7e9),
    "qwen3-32b-fp8-8xh200": Shape(5120, 64, 64, 8, 128, 25600, 151936, 40960, weight_bytes=34.3e9),
    "qwen3-32b-fp8-speculation-8xh200": Shape(5120, 64, 64, 8, 128, 25600, 151936, 40960, weight_bytes=34.3e9),
    "qwen3-32b-yarn-128k-8xh200": Shape(5120, 64, 64, 8, 128, 25600, 151936, 40960, weight_bytes=34.3e9),
    "llama-4-scout-17b-16e-8xh200": Shape(5120, 48, 40, 8, 128, 8192, 202048, 10485760, 16, weight_bytes=218e9),
    "qwen3-30b-a3b-8xh200": Shape(2048, 48, 32, 4, 128, 768, 151936, 40960, 128, weight_bytes=61.1e9),
    "qwen3-8b-2x24gb": Shape(4096, 36, 32, 8, 128, 12288, 151936, 40960, weight_bytes=16.4e9),
    "qwen3-14b-2x24gb": Shape(5120, 40, 40, 8, 128, 17408, 151936, 40960, weight_bytes=29.5e9),
    "smollm2-135m-cpu": Shape(576, 30, 9, 3, 64, 1536, 49152, 8192, weight_bytes=192.0e6),
}

MODES = {
    "demo": [(2, 1), (1, 2)],
    "llama-3.3-70b-fp8-8xh200": [(8, 1), (1, 8)],
    "llama-3.3-70b-fp8-8xh100": [(4, 2), (1, 8)],
    "qwen3-32b-fp8-8xh200": [(8, 1), (1, 8)],
    "qwen3-32b-fp8-speculation-8xh200": [(8, 1), (1, 8)],
    "qwen3-32b-yarn-128k-8xh200": [(8, 1), (1, 8)],
    "llama-4-scout-17b-16e-8xh200": [(4, 2), (1, 8)],
    "qwen3-30b-a3b-8xh200": [(8, 1), (1, 8)],
    "qwen3-8b-2x24gb": [(2, 1), (1, 2)],
    "qwen3-14b-2x24gb": [(1, 2)],
    "smollm2-135m-cpu": [(1, 1)],
}

DEVICE_BYTES = {"8xh200": 141e9, "8xh100": 80 * 2**30, "2x24gb": 24 * 2**30, "cpu": 2 * 2**30}


def shape_of(recipe):
    """The published shape of a recipe's model; the demo's is in the checkpoint that ships."""
    if recipe.stem != "demo":
        return SHAPES[recipe.stem]
    published = json.loads((Path(load_config(recipe).model.path) / "config.json").read_text())
    heads, hidden = published["num_attention_heads"], published["hidden_size"]
    return Shape(
        hidden,
        published["num_hidden_layers"],
        heads,
        published["num_key_value_heads"],
        published.get("head_dim") or hidden // heads,
        published["intermediate_size"],
        published["vocab_size"],
        published["max_position_embeddings"],
    )


every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def test_every_recipe_has_its_published_shape_and_modes_here():
    assert {path.stem for path in RECIPES} == set(MODES) == {*SHAPES, "demo"}


@every_recipe
def test_recipe_loads_without_output(recipe, caplog):
    refuse_unavailable(load_config(recipe))
    assert not caplog.messages


@every_recipe
def test_recipe_offers_the_modes_it_claims(recipe):
    parallel = load_config(recipe).parallel
    assert parallel.available_modes == [Mode(*pair) for pair in MODES[recipe.stem]]
    for mode in parallel.available_modes:
        check_mode(parallel.layout, mode)


@every_recipe
def test_heads_divide_over_the_ranks(recipe):
    shape = shape_of(recipe)
    assert heads_fit(load_config(recipe).parallel.world_size, shape.heads, shape.key_value_heads)


@every_recipe
def test_every_weight_slice_of_every_mode_holds_whole_heads_and_some_rows(recipe):
    shape, parallel = shape_of(recipe), load_config(recipe).parallel
    for mode in parallel.available_modes:
        heads = [even_span(shape.heads, index, mode.tp).size for index in range(mode.tp)]
        assert {size * shape.head_dim * mode.tp for size in heads} == {shape.heads * shape.head_dim}
        assert min(even_span(shape.intermediate, index, mode.tp).size for index in range(mode.tp)) > 0
    assert shape.vocabulary >= parallel.world_size


@every_recipe
def test_key_value_heads_are_copied_only_where_the_recipe_says_so(recipe):
    shape, world_size = shape_of(recipe), load_config(recipe).parallel.world_size
    owned = [key_value_span(shape.key_value_heads, shard, world_size).size for shard in range(world_size)]
    copies = sum(owned) / shape.key_value_heads
    assert copies == (2 if recipe.stem == "qwen3-30b-a3b-8xh200" else 1)


@every_recipe
def test_context_is_one_the_model_declares_or_is_stretched_to(recipe):
    model = load_config(recipe).model
    published = Qwen3Config(max_position_embeddings=shape_of(recipe).positions)
    assert (model.max_model_len or 1) <= max_supported_len(overridden(published, model.hf_overrides))


def test_the_recipe_of_long_context_has_yarn_as_its_model_card():
    """Four times the 32768 positions of Qwen3's training, and all of it is served by default."""
    model = load_config(ROOT / "recipes" / "qwen3-32b-yarn-128k-8xh200.yaml").model
    changed = overridden(Qwen3Config(max_position_embeddings=40960, rope_theta=1e6), model.hf_overrides)
    assert changed.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    assert choose_max_model_len(changed, None) == model.max_model_len == 131072


def test_the_recipe_of_speculation_chooses_the_number_of_tokens_by_measured_step_times():
    config = load_config(ROOT / "recipes" / "qwen3-32b-fp8-speculation-8xh200.yaml")
    assert (config.speculation.method, config.speculation.num_tokens) == ("suffix", "auto")
    assert config.policy.name == "adaptive"


@pytest.mark.parametrize("name", SHAPES)
def test_weights_of_a_rank_leave_room_for_the_cache(name):
    """At least 10 % of a device, and at least one request of the longest context the recipe allows."""
    config, shape = load_config(ROOT / "recipes" / f"{name}.yaml"), SHAPES[name]
    device = next(size for suffix, size in DEVICE_BYTES.items() if name.endswith(suffix))
    left = config.cache.memory_utilization * device - shape.weight_bytes / config.parallel.tp
    assert left > 0.1 * device
    local_heads = max(1, shape.key_value_heads // config.parallel.world_size)
    token_bytes = shape.layers * 2 * local_heads * shape.head_dim * 2
    assert (config.model.max_model_len or shape.positions) * token_bytes < left


QUANTIZED = {
    "llama-3.3-70b-fp8-8xh200": (
        LlamaConfig,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
            },
        },
    ),
    "qwen3-32b-fp8-8xh200": (Qwen3Config, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
}


def published_config(kind, shape, **more):
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.positions,
        dtype="bfloat16",
        **more,
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_take_their_published_bytes_and_are_cut_at_whole_blocks(name):
    """What the loader would keep of the public checkpoint, counted on its true shape without any memory."""
    config, shape, (kind, quantization) = load_config(ROOT / "recipes" / f"{name}.yaml"), SHAPES[name], QUANTIZED[name]
    more = {"head_dim": shape.head_dim, "quantization_config": quantization}
    published = published_config(kind, shape, tie_word_embeddings=False, **more)
    layout = config.parallel.layout
    plan = ModelBuilder(published, dict, config.model, layout, 3, torch.device("cpu"))
    elsewhere = shape.vocabulary * shape.hidden * 2 * 7 / 8  # of the head, a rank has its own rows alone
    assert plan.weight_bytes + elsewhere == pytest.approx(shape.weight_bytes, rel=0.01)
    layers = [module for module in plan.injection.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 7 * shape.layers
    for mode in config.parallel.available_modes:
        plan.injection.bind(layout.place(mode, 3))
        for _, piece in (product for layer in layers for product in layer._products):
            assert not any(number % 128 for number in (*piece.rows, *piece.columns))


def test_a_recipe_that_quantises_takes_the_bytes_that_it_says():
    """What is stored of the public checkpoint in bfloat16, counted on its true shape without any memory."""
    config, shape = load_config(ROOT / "recipes" / "smollm2-135m-cpu.yaml"), SHAPES["smollm2-135m-cpu"]
    published = published_config(LlamaConfig, shape, tie_word_embeddings=True)
    plan = ModelBuilder(published, dict, config.model, config.parallel.layout, 0, torch.device("cpu"))
    assert plan.weight_bytes == pytest.approx(shape.weight_bytes, rel=0.001)
    layers = [module for module in plan.injection.model.modules() if isinstance(module, QuantizedLinear)]
    assert {type(layer.scheme) for layer in layers} == {OnlineInt8}
    assert len(layers) == 7 * shape.layers + 1  # and the vocabulary head


def test_demo_shifts_between_prompt_and_decode_steps():
    config = load_config(ROOT / "recipes" / "demo.yaml")
    prompts = config.generate.prompts
    assert config.policy.name == "threshold"
    assert len(prompts) < config.policy.threshold_tokens, "a step that only decodes runs in the shift mode"
    assert len(set(config.generate.schedule)) > 1, "prompts arrive while others decode"


@pytest.mark.parametrize("piece", PIECES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_reusable_piece_loads_alone(piece):
    refuse_unavailable(load_config(piece, ["model.path=org/model"]))
