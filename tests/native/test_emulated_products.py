"""Products with quantised weights in C compiled for levels of Arm, with and without dot products of 8-bit integers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.model.quantization.checkpoints import compressed, float_zeros, int8_channel
from tests.model.quantization.mixtures import mxfp4
from tests.native.building import ARM_LEVELS, build_for
from tests.native.test_quantized_products import check, weights_of
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.model.quantization import native_products
from ulysses_infer.model.quantization.float_zeros import FloatZeroWeight
from ulysses_infer.model.quantization.mxfp4 import Mxfp4Weight
from ulysses_infer.model.quantization.packed import CompressedWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.parallel.layout import Span

SCHEMES: list[Any] = [
    (float_zeros(32), FloatZeroWeight(32)),
    (float_zeros(128), FloatZeroWeight(128)),
    (compressed(32, symmetric=False), CompressedWeight(32, 4, False)),
    (int8_channel, ScaledWeight("weight_scale", "channel", dtype=torch.int8)),
    (mxfp4, Mxfp4Weight()),
]


@pytest.fixture(params=ARM_LEVELS)
def level(request: Any, monkeypatch: Any) -> Iterator[str]:
    native_products._functions.cache_clear()
    monkeypatch.setattr(native_products, "most_rows", lambda bits: 3)  # more rows are multiplied by the other kernel
    monkeypatch.setattr(native_products, "open_library", lambda name: build_for(name, request.param))
    yield request.param
    native_products._functions.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("quantise", "scheme"), SCHEMES, ids=lambda value: type(value).__name__)
def test_slices_equal_those_of_dense_weights(level: str, quantise: Any, scheme: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights, dense = weights_of(quantise, scheme, Span(3, 74), Span(64, 279), 64)
    for rows in (1, 6, 23):
        given = torch.randn(rows, dense.shape[1]).to(dtype)
        check(weights.product(given, None), given, dense, None, dtype, float(dense.abs().max()))


def test_experts_are_multiplied_each_by_its_rows(level: str) -> None:
    torch.manual_seed(0)
    codes, scales = torch.randint(-127, 128, (3, 40, 96), dtype=torch.int8), torch.rand(3, 40, 1) / 100
    weights = native_products.NativeWeights(StoredExperts(codes, 40, 96, scales=scales), 32)
    ends, given = torch.tensor([5, 5, 20], dtype=torch.int32), torch.randn(20, 96).bfloat16()
    found = weights.experts_product(given, ends)
    for expert, own in ((0, slice(0, 5)), (2, slice(5, 20))):
        dense = codes[expert].float() * scales[expert]
        check(found[own], given[own], dense, None, torch.bfloat16, float(dense.abs().max()))


@pytest.mark.parametrize("inputs", [64, 76])
def test_integers_are_multiplied_exactly(level: str, inputs: int) -> None:
    """Inputs that are multiples of their segment's step need no rounding, and sums are below 2^24."""
    torch.manual_seed(inputs)
    codes = torch.randint(-127, 128, (37, inputs), dtype=torch.int8)
    codes[0], codes[1] = 127, -127
    stored = StoredExperts(codes[None], 37, inputs, scales=torch.ones(1, 37, 1))
    weights = native_products.NativeWeights(stored, 32)
    for rows in (1, 8):
        given = torch.randint(-127, 128, (rows, inputs)).float()
        given[:, ::32], given[-1] = 127, -127
        output = torch.empty(rows, 37)
        addresses = ctypes.byref(weights._struct), given.data_ptr(), None, output.data_ptr()
        weights._product(*addresses, rows, inputs, 0, 3)
        assert output.tolist() == (given @ codes.float().t()).tolist()
