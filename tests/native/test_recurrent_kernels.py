"""The native form of a recurrent layer computes what transformers' forward computes, with its states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from tests.native.building import ARM_LEVELS, X86, build_for
from tests.native.recurrent_layers import SHAPES, make_layer
from ulysses_infer.cache.states import StateCache, StateSequences
from ulysses_infer.model.recurrent.layer import RecurrentLayer
from ulysses_infer.model.recurrent.native import form, norm
from ulysses_infer.model.recurrent.runs import runs_of
from ulysses_infer.native.arena import Arena
from ulysses_infer.native.cpu_graph import CpuGraph
from ulysses_infer.native.library import is_available

LIBRARIES = ("delta_net", "short_convolution", "state_space", "lightning")
pytestmark = pytest.mark.skipif(not all(map(is_available, LIBRARIES)), reason="needs a C compiler")
CPU = torch.device("cpu")
SCALED = ("falcon_h1",)  # torch multiplies their inputs
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2}


def native_layer(kind: str, dtype: torch.dtype, world_size: int = 1, shard: int = 0) -> RecurrentLayer:
    """A recurrent layer of a random model, loaded with its native form."""
    layer = make_layer(kind, dtype, SHAPES[kind], world_size, shard)
    assert layer.native is not None
    return layer


EQUAL = (
    ("qwen3_5_text", torch.float32),
    ("kimi_linear", torch.bfloat16),
    ("bamba", torch.bfloat16),
    ("nemotron_h", torch.float32),
    ("minimax", torch.float32),
    ("lfm2", torch.bfloat16),
)


def cases(values: Iterable[Any], default: Sequence[Any]) -> list[Any]:
    """All `values`, those not in `default` marked as thorough."""
    marks = ((value, () if value in default else pytest.mark.thorough) for value in values)
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=mark) for v, mark in marks]


Pair = tuple[torch.Tensor, torch.Tensor]


@torch.inference_mode()
def run_both(layer: RecurrentLayer, lengths: Sequence[int], dtype: torch.dtype, spread: float = 1.0) -> list[Pair]:
    """Results and states of the layer's own forward and of its native form, run by run."""
    assert layer.native is not None
    random = torch.Generator().manual_seed(len(lengths))
    caches = [StateCache(layer.state_shapes, 5, CPU) for _ in range(2)]
    for shape in layer.state_shapes:
        states = [cache.state(shape.layer, shape.kind, shape.index) for cache in caches]
        states[0].copy_(torch.randn(states[0].shape, generator=random))
        states[1].copy_(states[0])
    slots = torch.tensor([4, 0, 3, 1, 2])[: len(lengths)]
    inputs = [(torch.randn(sum(lengths), width, generator=random) * spread).to(dtype) for width in layer.own_widths]
    number = layer.module.layer_idx
    results = [
        (layer.run_inner(caches[0], run, inputs), layer.native(caches[1], number, run, inputs))
        for run in runs_of(StateSequences(slots, lengths))
    ]
    keys = [(shape.layer, shape.kind, shape.index) for shape in layer.state_shapes]
    return [*results, *((caches[0].state(*key), caches[1].state(*key)) for key in keys)]


def check(pairs: list[Pair], tolerance: float) -> None:
    for expected, found in pairs:
        assert expected.isfinite().all()
        assert found.dtype == expected.dtype
        assert (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize(("kind", "dtype"), cases([(k, d) for k in SHAPES for d in TOLERANCE], EQUAL), ids=str)
def test_it_equals_transformers(kind: str, dtype: torch.dtype) -> None:
    layer = native_layer(kind, dtype)
    for lengths in ([1], [1, 1, 1], [2], [70, 3], [1, 5, 1, 5, 130]):
        check(run_both(layer, lengths, dtype), TOLERANCE[dtype])


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", X86[1:])
@pytest.mark.parametrize(("kind", "dtype"), EQUAL, ids=str)
def test_it_equals_transformers_on_other_processors(
    kind: str, dtype: torch.dtype, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (form, norm):
        monkeypatch.setattr(module, "open_library", lambda name: build_for(name, architecture))
    layer = native_layer(kind, dtype)
    for lengths in ([1, 1], [37], [1, 5, 18]):
        check(run_both(layer, lengths, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("architecture", ARM_LEVELS[-1:])  # without any extension
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("kimi_linear", torch.bfloat16),
        ("nemotron_h", torch.float32),
        ("minimax", torch.float32),
        ("lfm2", torch.bfloat16),
    ],
)
def test_it_equals_transformers_on_arm(
    kind: str, dtype: torch.dtype, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (form, norm):
        monkeypatch.setattr(module, "open_library", lambda name: build_for(name, architecture))
    check(run_both(native_layer(kind, dtype), [1, 5], dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("shard", cases(range(6), (4,)))
def test_ranks_that_share_a_key_head_have_it_too(shard: int) -> None:
    layer = native_layer("qwen3_next", torch.float32, 6, shard)
    assert (layer.module.num_k_heads, layer.module.num_v_heads) == (1, 1)
    check(run_both(layer, [1, 1, 9], torch.float32), 4e-6)


@pytest.mark.parametrize("kind", cases(SHAPES, ("bamba",)))
def test_gates_at_their_limits_give_no_nan(kind: str) -> None:
    check(run_both(native_layer(kind, torch.float32), [1, 40], torch.float32, spread=200.0), 1e-3)


@pytest.mark.parametrize("kind", cases(("bamba", "kimi_linear", "lfm2", "minimax"), ("bamba",)))
@torch.inference_mode()
def test_slots_of_other_sequences_are_left_alone(kind: str) -> None:
    layer = native_layer(kind, torch.float32)
    assert layer.native is not None
    cache = StateCache(layer.state_shapes, 3, CPU)
    cache.clear(torch.arange(3))
    run = runs_of(StateSequences(torch.tensor([1]), [4]))[0]
    layer.native(cache, layer.module.layer_idx, run, [torch.randn(4, width) for width in layer.own_widths])
    for shape in layer.state_shapes:
        state = cache.state(shape.layer, shape.kind, shape.index)
        assert not state[0].any()
        assert state[1].any()
        assert not state[2].any()


@pytest.mark.parametrize("kind", cases(SHAPES, ("kimi_linear", "bamba", "lfm2")))
@torch.inference_mode()
def test_decodes_are_replayed_without_torch(kind: str) -> None:
    layer = native_layer(kind, torch.bfloat16)
    assert layer.native is not None
    caches = [StateCache(layer.state_shapes, 3, CPU) for _ in range(2)]
    for cache in caches:
        cache.clear(torch.arange(3))
    run, number = runs_of(StateSequences(torch.tensor([2, 0]), [1, 1]))[0], layer.module.layer_idx
    inputs = [torch.zeros(2, width, dtype=torch.bfloat16) for width in layer.own_widths]
    graph = CpuGraph(Arena())
    with graph.recording():
        result = layer.native(caches[0], number, run, inputs)
    assert graph.problem is None
    assert graph.num_torch_calls <= graph.num_native_calls
    assert graph.num_torch_calls == (kind in SCALED)
    caches[0].clear(torch.arange(3))
    for _ in range(2):
        for each in inputs:
            each.normal_()
        graph.replay()
        assert torch.equal(result, layer.native(caches[1], number, run, inputs))
    for shape in layer.state_shapes:
        key = shape.layer, shape.kind, shape.index
        assert torch.equal(caches[0].state(*key), caches[1].state(*key))
