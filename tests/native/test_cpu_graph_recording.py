"""Recorded steps: a replay computes on new inputs what the recording computed on its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ulysses_infer.model.fusion.elementwise import NativeElementwise
from ulysses_infer.model.layers.head_plan import HeadPlan
from ulysses_infer.native.arena import Arena
from ulysses_infer.native.choice import Choice, measure
from ulysses_infer.native.cpu_graph import CpuGraph
from ulysses_infer.native.function import ALL_REDUCE, ELEMENTWISE, KINDS, MATMUL, is_recording
from ulysses_infer.native.library import is_available
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.head_layout import head_layout
from ulysses_infer.parallel.layout import Mode, Place

CHOICES = {torch.float32: Choice({1: "few"}), torch.bfloat16: Choice({1: "few"})}
pytestmark = pytest.mark.skipif(not is_available("cpu_graph"), reason="no C compiler here")
WIDTH = 48


def recorded(step: Callable[[], torch.Tensor]) -> tuple[CpuGraph, torch.Tensor]:
    """The graph of `step` and its result."""
    graph = CpuGraph(Arena())
    with torch.inference_mode(), graph.recording():
        result = step()
    assert not is_recording()
    return graph, result


@torch.inference_mode()
def replayed(graph: CpuGraph, result: torch.Tensor) -> torch.Tensor:
    graph.replay()
    return result.clone()


class Layer:
    """Native and torch's operations, views and temporary results among them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.matmul, self.elementwise = (
            NativeMatmul(CHOICES),
            NativeElementwise(dtype),
        )
        self.first, self.second = torch.randn(2 * WIDTH, WIDTH).to(dtype), torch.randn(WIDTH, WIDTH).to(dtype)
        self.norm = torch.rand(WIDTH).to(dtype)
        self.total = torch.zeros(WIDTH).to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.elementwise.rms_norm(x, self.norm, 1e-5)
        gate, up = self.matmul(normed, self.first).split(WIDTH, dim=-1)
        gated = self.elementwise.gated("silu", gate, up)
        down = self.matmul(gated, self.second)
        self.total.add_(down.sum(dim=0))
        _, last = self.elementwise.add_rms_norm(down, x.clone(), self.norm, 1e-5)
        return torch.cat((last.view(-1, 2, WIDTH // 2).transpose(0, 1).contiguous().flatten(), down.flatten()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_replay_computes_what_the_step_would_compute(dtype, rows):
    x, layer = torch.randn(rows, WIDTH).to(dtype), Layer(dtype)
    graph, result = recorded(lambda: layer(x))
    assert graph.problem is None
    assert graph.num_native_calls == 5
    for _ in range(3):
        x.copy_(torch.randn(rows, WIDTH))
        before = layer.total.clone()
        expected = layer(x)
        total = layer.total.clone()
        layer.total.copy_(before)
        assert torch.equal(replayed(graph, result), expected)
        assert torch.equal(layer.total, total)  # in-place changes happen at every replay


def test_recording_also_runs_the_step():
    x, layer = torch.randn(3, WIDTH), Layer(torch.float32)
    _, result = recorded(lambda: layer(x))
    total = layer.total.clone()
    layer.total.zero_()
    assert torch.equal(layer(x), result)
    assert torch.equal(layer.total, total)


def test_graphs_that_share_memory_do_not_disturb_each_other():
    arena, layers, graphs = Arena(), [Layer(torch.float32) for _ in range(3)], []
    x = torch.randn(2, WIDTH)
    for layer in layers:
        graph = CpuGraph(arena)
        with torch.inference_mode(), graph.recording():
            graphs.append((graph, layer(x)))
    x.copy_(torch.randn(2, WIDTH))
    for index in (0, 2, 1, 0):
        graph, result = graphs[index]
        assert torch.equal(replayed(graph, result), layers[index](x))


def test_native_calls_are_timed_by_kind():
    x, layer = torch.randn(2, WIDTH), Layer(torch.float32)
    graph, result = recorded(lambda: layer(x))
    assert {graph.seconds_of(kind) for kind in KINDS} == {0.0}  # recording does not time calls
    replayed(graph, result)
    assert graph.seconds_of(MATMUL) > 0
    assert graph.seconds_of(ELEMENTWISE) > 0
    assert graph.seconds_of(ALL_REDUCE) == 0


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda x: x * x.sum().item(), id="a number read"),
        pytest.param(lambda x: x + torch.tensor([float(len(x))]), id="a constant of Python's"),
        pytest.param(lambda x: x[x > 0], id="a shape that depends on data"),
        pytest.param(lambda x: torch.unique(x, return_counts=True)[0], id="several results"),
    ],
)
def test_a_step_that_cannot_be_replayed_names_the_reason_and_runs_normally(step):
    x = torch.randn(8)
    graph, result = recorded(lambda: step(x))
    assert graph.problem is not None
    assert "cannot be repeated" in graph.problem
    assert torch.equal(result, step(x))


def test_nothing_is_recorded_after_an_exception():
    graph = CpuGraph(Arena())
    with pytest.raises(ZeroDivisionError), graph.recording():
        raise ZeroDivisionError
    assert not is_recording()
    NativeMatmul(CHOICES)(torch.randn(1, WIDTH), torch.randn(WIDTH, WIDTH))
    assert graph.num_native_calls == 0


def test_kernels_that_are_measured_meanwhile_are_no_part_of_the_step():
    """The first step of an engine on a new machine measures, and may be recorded."""
    matmul, x, weight = NativeMatmul(CHOICES), torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH)
    calls = []

    def prepare(kernel: str, rows: int) -> Callable[[], object]:
        inputs = torch.ones(rows, WIDTH)

        def call() -> torch.Tensor:
            calls.append(kernel)
            result = matmul(inputs, weight) * 2
            result[0, 0].tolist()
            return result

        return call

    def step() -> torch.Tensor:
        chosen = measure(("one", "other"), prepare, rows=(1, 2))
        assert chosen(1) in ("one", "other")
        assert is_recording()
        return matmul(x, weight)

    graph, result = recorded(step)
    assert len(calls) > 4
    assert (graph.num_native_calls, graph.num_torch_calls, graph.problem) == (1, 0, None)
    x.copy_(torch.randn(3, WIDTH))
    assert torch.equal(replayed(graph, result), matmul(x, weight))


@pytest.mark.parametrize("mode", [Mode(1, 2), Mode(2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_heads_are_arranged_without_calls_of_torch(mode, dtype):
    plan = HeadPlan(head_layout(2, 9, 3))
    plan.bind(Place(mode, 0, 2))
    query_heads, shared, size = plan.local_attention_heads, plan.local_key_value_heads, 16
    packed = torch.randn(5, (query_heads + shared) * size).to(dtype)

    def arrange():
        heads = packed.view(5, query_heads + shared, size)
        query, key = plan.arranged(heads[:, :query_heads], heads[:, query_heads:])
        return torch.cat((query, key, plan.restored(query)), dim=1)

    graph, result = recorded(arrange)
    assert graph.problem is None
    assert graph.num_torch_calls == 1  # `cat`
    packed.copy_(torch.randn(packed.shape))
    heads = packed.view(5, query_heads + shared, size)
    queries, keys = plan.query_index(packed.device), plan.key_value_index(packed.device)
    query = heads[:, :query_heads][:, queries]
    key = heads[:, query_heads:] if keys is None else heads[:, query_heads:][:, keys]
    found = replayed(graph, result)
    assert torch.equal(found[:, : query.shape[1]], query)
    assert torch.equal(found[:, query.shape[1] :][:, : key.shape[1]], key)
    own = found[:, query.shape[1] + key.shape[1] :]
    assert torch.equal(own, heads[:, :query_heads])
