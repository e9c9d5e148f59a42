"""The product of all experts in the interpreter, against the weights dequantised from the formats' descriptions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.interpreter import use_exact_rounding
from tests.model.quantization.checkpoints import (
    awq,
    compressed,
    float_zeros,
    fp8_block,
    fp8_channel,
    fp8_tensor,
    gptq,
    int8_channel,
)
from tests.model.quantization.mixtures import fbgemm, mxfp4

pytest.importorskip("triton")

from ulysses_infer.kernels import experts as kernels
from ulysses_infer.kernels.experts import (
    DenseProduct,
    Tiles,
    are_alike,
    down_product,
    gated_product,
    grouped_product,
    row_tiles,
    tiles_of,
)
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.kernels.launch import assume
from ulysses_infer.model.quantization.component import Component, covering
from ulysses_infer.model.quantization.float_zeros import FloatZeroWeight
from ulysses_infer.model.quantization.mxfp4 import Mxfp4Weight
from ulysses_infer.model.quantization.packed import AwqWeight, CompressedWeight, GptqWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight, TransposedScaledWeight
from ulysses_infer.parallel.layout import Span

SHAPE = 40, 96
"""Outputs, inputs: several tiles, and several groups within and across tiles."""
WHOLE = Span(0, 40), Span(0, 96)
SCHEMES: dict[str, tuple[Any, Any]] = {
    "FP8 block": (fp8_block((32, 64)), ScaledWeight("weight_scale_inv", "block", (32, 64))),
    "FP8 block, uneven": (fp8_block((7, 9)), ScaledWeight("weight_scale_inv", "block", (7, 9))),
    "FP8 channel": (fp8_channel, ScaledWeight("weight_scale", "channel")),
    "FP8 tensor": (fp8_tensor("weight_scale", ()), ScaledWeight("weight_scale", "tensor")),
    "FP8 transposed": (fbgemm, TransposedScaledWeight()),
    "int8": (int8_channel, ScaledWeight("weight_scale", "channel", dtype=torch.int8)),
    "mxfp4": (mxfp4, Mxfp4Weight()),
    "AWQ": (awq(64), AwqWeight(64)),
    "AWQ, one group": (awq(-1), AwqWeight(-1)),
    "GPTQ": (gptq(16), GptqWeight(16)),
    "GPTQ, groups of 20": (gptq(20), GptqWeight(20)),
    "GPTQ reordered": (gptq(32, reordered=True), GptqWeight(32, 4, True)),
    "GPTQ v2, 8 bits": (gptq(32, 8, version=2), GptqWeight(32, 8, zero_offset=0)),
    "int4": (compressed(32, symmetric=True), CompressedWeight(32)),
    "int4 with zero points": (compressed(16, symmetric=False), CompressedWeight(16, 4, False)),
    "int4 with float zero points": (float_zeros(16), FloatZeroWeight(16)),
    "int4 reordered": (compressed(32, symmetric=True, reordered=True), CompressedWeight(32, 4, True, True)),
}
WHOLE_BY_DEFAULT = ("FP8 block", "FP8 transposed", "int8", "mxfp4", "AWQ", "GPTQ", "int4")
"""Of all formats, slices are tested."""
COUNTS = {
    "some without tokens": (0, 3, 0, 5),
    "one has all": (0, 0, 21, 0),
    "several tiles": (17, 1, 33, 16),
    "none": (0, 0, 0, 0),
}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    use_exact_rounding()
    use_tiles(monkeypatch, Tiles(16, 32, 32, 4, 1))


def use_tiles(monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    monkeypatch.setattr(kernels, "tiles_of", lambda *shape, **options: tiles)


def make(name: str, num_experts: int = 4) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The components of all experts, and the dense weights [E, out, in]."""
    quantise, scheme = SCHEMES[name]
    torch.manual_seed(0)
    found = [quantise(torch.randn(SHAPE) / 8) for _ in range(num_experts)]
    names = {"_blocks": "blocks", "_scales": "scales", "": "weight", "_scale": "weight_scale"}
    components: dict[str, Component] = scheme.components(*SHAPE)
    stored = {names.get(key, key): torch.stack([each[key] for each, _ in found]) for key in found[0][0]}
    parts = {key: stored[key].to(each.dtype).view(num_experts, *each.shape) for key, each in components.items()}
    return parts, torch.stack([dense for _, dense in found])


def cut(name: str, parts: dict[str, torch.Tensor], rows: Span, columns: Span) -> StoredExperts:
    """Views of what covers the slice."""
    scheme, views = SCHEMES[name][1], dict(parts)
    for key, component in scheme.components(*SHAPE).items():
        for axis, span in ((component.outputs, rows), (component.inputs, columns)):
            if axis is not None:
                kept = covering(span, axis.step)
                views[key] = views[key].narrow(axis.dimension + 1, kept.start, kept.size)
    return scheme.stored_experts(views, rows, columns)


def check(
    stored: StoredExperts,
    dense: torch.Tensor,
    counts: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    capability: tuple[int, int] = (9, 0),
    foreign: int = 3,
) -> None:
    """Each token is multiplied by its expert's matrix, and `foreign` rows after the last are left alone."""
    tokens = torch.randn(sum(counts) + foreign, dense.shape[2]).to(dtype)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    with assume("cpu", capability):
        output = grouped_product(tokens, offsets, stored)
    assert output.shape == (len(tokens), dense.shape[1])
    assert output.dtype == dtype
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    wanted = torch.einsum("sk,snk->sn", tokens[: sum(counts)].double(), dense[chosen].double())
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(output[: sum(counts)].double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "name", [name if name in WHOLE_BY_DEFAULT else pytest.param(name, marks=pytest.mark.thorough) for name in SCHEMES]
)
def test_formats(name: str) -> None:
    parts, dense = make(name)
    check(cut(name, parts, *WHOLE), dense, COUNTS["some without tokens"])


@pytest.mark.parametrize("name", SCHEMES)
def test_slices_that_begin_and_end_anywhere(name: str) -> None:
    parts, dense = make(name)
    rows, columns = Span(13, 38), Span(37, 93)
    check(cut(name, parts, rows, columns), dense[:, slice(*rows), slice(*columns)], (2, 0, 1, 0))


@pytest.mark.parametrize("counts", COUNTS)
def test_tokens_of_experts(counts: str) -> None:
    parts, dense = make("FP8 channel")
    check(cut("FP8 channel", parts, *WHOLE), dense, COUNTS[counts])


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.thorough)])
def test_many_experts(seed: int) -> None:
    """Nearly as many tiles as the grid has."""
    torch.manual_seed(seed)
    dense = torch.randn(37, 5, 16)
    counts = torch.bincount(torch.randint(37, (90,)), minlength=37).tolist()
    check(StoredExperts(dense, 5, 16), dense, (*counts,), foreign=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["FP8 block", "mxfp4", "int4 with zero points"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    parts, dense = make(name)
    check(cut(name, parts, *WHOLE), dense, (2, 0, 1, 0), dtype)


@pytest.mark.parametrize("name", ["mxfp4", "AWQ", "GPTQ", "GPTQ, groups of 20", "FP8 block"])
def test_deep_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups in each tile."""
    use_tiles(monkeypatch, Tiles(16, 64, 128, 4, 1))
    parts, dense = make(name)
    rows, columns = Span(9, 40), Span(13, 96)
    check(cut(name, parts, rows, columns), dense[:, slice(*rows), slice(*columns)], (2, 0, 1, 0))


def test_fp8_is_read_by_its_bits_before_ada() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    dense = numbers.view(1, 8, 32)
    for capability in ((8, 0), (9, 0)):
        check(StoredExperts(dense.to(torch.float8_e4m3fn), 8, 32), dense, (2,), capability=capability)


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_weights_with_any_strides(transposed: bool) -> None:
    dense = torch.randn(4, 41, 70)
    stored = dense.transpose(1, 2).contiguous().transpose(1, 2) if transposed else dense
    view = stored[:, 3:40, 5:60]
    check(StoredExperts(view, 37, 55), dense[:, 3:40, 5:60], COUNTS["some without tokens"])


def test_the_grid_has_room_for_every_distribution() -> None:
    for num_tokens in (0, 1, 7, 40):
        for num_experts in (1, 3, 9):
            most = row_tiles(num_tokens, num_experts, 16)
            for _ in range(50):
                chosen = torch.randint(num_experts, (num_tokens,)) % torch.randint(1, num_experts + 1, ())
                counts = torch.bincount(chosen, minlength=num_experts)
                assert sum(-(-int(count) // 16) for count in counts) <= most


def test_no_experts_and_no_tokens() -> None:
    dense = torch.randn(2, 4, 16)
    with assume("cpu", (9, 0)):
        empty = torch.empty(0, dtype=torch.int32)
        assert grouped_product(torch.randn(3, 16), empty, StoredExperts(dense[:0], 4, 16)).shape == (3, 4)
        offsets = torch.zeros(2, dtype=torch.int32)
        assert grouped_product(torch.randn(0, 16), offsets, StoredExperts(dense, 4, 16)).shape == (0, 4)


def test_tiles_follow_the_tokens_per_expert() -> None:
    stored = StoredExperts(torch.empty(128, 768, 64, device="meta"), 768, 64)
    rows = [tiles_of(each, stored, 2).rows for each in (1, 4, 17, 32, 64, 512)]
    assert rows == [16, 16, 32, 32, 64, 128]


# -- gated products of gathered tokens, and products beside them ------------------------------------------------------


def sorted_rows(counts: tuple[int, ...], foreign: int, choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A permutation of the choices, and where the rows of each expert, and of no expert, end."""
    offsets = torch.tensor((*counts, foreign)).cumsum(0).to(torch.int32)
    return torch.randperm(int(offsets[-1])) // choices, offsets


def activation_of(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    active = F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")
    return active * up


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "name", ["FP8 block", "mxfp4", "AWQ", *(pytest.param(name, marks=pytest.mark.thorough) for name in SCHEMES)]
)
def test_gated_products_of_gathered_tokens(name: str, activation: str) -> None:
    """Gate and up are slices of one matrix or two matrices."""
    parts, dense = make(name)
    others, other_dense = ({key: part.flip(0) for key, part in parts.items()}, dense.flip(0))
    rows, columns = Span(8, 40), Span(32, 96)
    counts, foreign = (2, 0, 5, 1), 2
    gate, up = cut(name, parts, rows, columns), cut(name, others, rows, columns)
    assert are_alike(gate, up) == (gate.groups is None)
    if gate.groups is not None:
        return
    index, offsets = sorted_rows(counts, foreign, 2)
    tokens = torch.randn(5, columns.size)
    with assume("cpu", (9, 0)):
        output, _ = gated_product(tokens, index, offsets[:-1], gate, up, activation, num_experts=6)
    chosen = torch.arange(4).repeat_interleave(torch.tensor(counts))
    read = tokens[index][: len(chosen)]
    products = [torch.einsum("sk,snk->sn", read, each[chosen, 8:40, 32:96]) for each in (dense, other_dense)]
    wanted = activation_of(activation, *products)
    torch.testing.assert_close(output[: len(chosen)], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(2, 0, 17, 1), (0, 0, 0, 0)])
def test_a_product_of_all_tokens_beside_those_of_experts(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Both products of a mixture with a shared expert: each token has one expert, here or on another rank."""
    foreign, width, hidden = 3, 24, 40
    dense = (torch.randn(4, hidden, 2 * width) / 8).to(dtype)  # as llama4 stores it
    gate, up = (StoredExperts(each.transpose(1, 2), width, hidden) for each in dense.chunk(2, dim=-1))
    stacked = (torch.randn(2, 2 * 10, hidden) / 8).to(dtype)  # gate and up of two shards
    down, shared_down = (torch.randn(4, width, hidden).to(dtype) / 8, torch.randn(1, hidden, 20).to(dtype) / 8)
    index, offsets = sorted_rows(counts, foreign, 1)
    tokens, own = torch.randn(len(index), hidden).to(dtype), torch.randn(5, hidden).to(dtype)
    with assume("cpu", (9, 0)):
        beside = DenseProduct(own, stacked[:, :10], stacked[:, 10:])
        inner, shared = gated_product(tokens, index, offsets[:-1], gate, up, "silu", 8, beside)
        stored = StoredExperts(down.transpose(1, 2), hidden, width)
        assert shared is not None
        output, shared = down_product(inner, index, offsets, stored, 8, DenseProduct(shared, shared_down))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    wanted = torch.zeros(len(index), hidden)
    for row, expert in enumerate(torch.arange(4).repeat_interleave(torch.tensor(counts)).tolist()):
        products = (tokens[index[row]].float() @ each[expert].float() for each in dense.chunk(2, dim=-1))
        active = activation_of("silu", *products)
        wanted[index[row]] = active @ down[expert].float()
    torch.testing.assert_close(output.float(), wanted, atol=tolerance, rtol=tolerance)
    gates, ups = (stacked[:, part].flatten(0, 1).float() for part in (slice(0, 10), slice(10, 20)))
    active = activation_of("silu", own.float() @ gates.t(), own.float() @ ups.t())
    assert shared is not None
    torch.testing.assert_close(shared.float(), active @ shared_down[0].t().float(), atol=tolerance, rtol=tolerance)
