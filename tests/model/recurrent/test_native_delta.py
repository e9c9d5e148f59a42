"""The native form of a gated delta net computes what transformers' forward computes, with its states."""

import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3NextConfig, Qwen3NextForCausalLM

from ulysses_infer.cache.states import StateCache, StateSequences
from ulysses_infer.config import ModelConfig
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.model.recurrent.runs import runs_of
from ulysses_infer.native.library import is_available
from ulysses_infer.parallel.layout import Layout, Mode

pytestmark = pytest.mark.skipif(not is_available("delta_net"), reason="needs a C compiler")
CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "layer_types": ["linear_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 80,
    "tie_word_embeddings": False,
}
MODELS = {
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, num_experts=0, mlp_only_layers=[0])),
    "qwen3_5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SHAPE)),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def native_layer(name, dtype, world_size=1, shard=0):
    """A recurrent layer of a random model, loaded with its native form."""
    torch.manual_seed(3)
    model = MODELS[name]().to(dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    layout = Layout(Mode(world_size, 1))
    loaded = ModelBuilder.from_pretrained(model, ModelConfig("unused"), layout, shard, CPU).load()
    (layer,) = loaded.injection.recurrent_layers
    assert layer.native is not None
    return layer


def run_both(layer, lengths, dtype, spread=1.0):
    """Results and states of the layer's own forward and of its native form, run by run."""
    caches = [StateCache(layer.state_shapes, 5, CPU) for _ in range(2)]
    for shape in layer.state_shapes:
        states = [cache.state(shape.layer, shape.kind, shape.index) for cache in caches]
        states[0].copy_(torch.randn(states[0].shape))
        states[1].copy_(states[0])
    slots = torch.tensor([4, 0, 3, 1, 2])[: len(lengths)]
    inputs = [(torch.randn(sum(lengths), width) * spread).to(dtype) for width in layer.own_widths]
    results = [
        (layer.run_inner(caches[0], run, inputs), layer.native(caches[1], 0, run, inputs))
        for run in runs_of(StateSequences(slots, lengths))
    ]
    keys = [(shape.layer, shape.kind, shape.index) for shape in layer.state_shapes]
    return [*results, *((caches[0].state(*key), caches[1].state(*key)) for key in keys)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [2], [70, 3], [1, 5, 1, 5, 130]], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_it_equals_transformers(name, lengths, dtype):
    for expected, found in run_both(native_layer(name, dtype), lengths, dtype):
        scale = expected.float().abs().max()
        assert (found.float() - expected.float()).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("shard", range(6))
@torch.inference_mode()
def test_ranks_that_share_a_key_head_have_it_too(shard):
    layer = native_layer("qwen3_next", torch.float32, 6, shard)
    assert (layer.module.num_k_heads, layer.module.num_v_heads) == (1, 1)
    for expected, found in run_both(layer, [1, 1, 9], torch.float32):
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@torch.inference_mode()
def test_gates_at_their_limits_give_no_nan():
    for expected, found in run_both(native_layer("qwen3_next", torch.float32), [1, 40], torch.float32, spread=200.0):
        assert expected.isfinite().all()
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_slots_of_other_sequences_are_left_alone():
    layer = native_layer("qwen3_5", torch.float32)
    cache = StateCache(layer.state_shapes, 3, CPU)
    cache.clear(torch.arange(3))
    run = runs_of(StateSequences(torch.tensor([1]), [4]))[0]
    layer.native(cache, 0, run, [torch.randn(4, width) for width in layer.own_widths])
    for shape in layer.state_shapes:
        state = cache.state(shape.layer, shape.kind, shape.index)
        assert not state[0].any()
        assert state[1].any()
        assert not state[2].any()
