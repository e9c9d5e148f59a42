"""Products with quantised weights in C, of every format and slice, on this processor and as built for older ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.fake_step import FakeCollectives, step
from tests.model.quantization.test_component import GRAINS, loaded
from tests.native.building import X86, build_for
from ulysses_infer.model.quantization import native_products, products
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.parallel.sharding import Part, Sharding

LAYOUT, SHARD = Layout(Mode(2, 2)), 3
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2e-6}
QUANTISING = 1 / 127
"""Error of a quantised input relative to the largest one of its segment."""


@pytest.fixture(params=X86, autouse=True)
def architecture(request: Any, monkeypatch: Any) -> Any:
    native_products._functions.cache_clear()
    monkeypatch.setattr(native_products, "open_library", lambda name: build_for(name, request.param))
    yield request.param
    native_products._functions.cache_clear()


def products_of(layer: Any) -> set[str]:
    return {type(product).__name__ for product, _ in layer._products}


@pytest.mark.parametrize("cut", ["column", "row"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("quantise", "scheme"), GRAINS, ids=lambda value: type(value).__name__)
def test_products_equal_those_of_dense_weights(quantise: Any, scheme: Any, cut: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    outputs, inputs = 70, 320
    tensors, dense = quantise(torch.randn(outputs, inputs))
    bias = torch.randn(outputs) if cut == "column" else None
    sharding = Sharding((Part(dense.shape[cut == "row"]),))
    for mode in LAYOUT.modes:
        place = LAYOUT.place(mode, SHARD)
        layer = loaded(scheme, tensors, dense.shape, cut, sharding, LAYOUT, SHARD, bias)
        if bias is not None:
            layer.bias.data = layer.bias.data.to(dtype)
        layer.bind(place)
        assert products_of(layer) == {"NativeProduct"}
        (span,) = sharding.spans(place.weight_index, place.mode.tp)
        own = slice(*span)
        for rows in (1, 2, 3, 7, 11, 16, 17, 33, 50):
            given = torch.randn(rows, inputs).to(dtype)
            with step(FakeCollectives(), matmul=products.linear), pytest.MonkeyPatch.context() as patch:
                patch.setattr(products, "DequantisedProduct", None)
                if cut == "column":
                    found, weight = layer(given), dense[own]
                else:
                    given = given[:, own]
                    found, weight = layer.partial(given), dense[:, own]
            check(found, given, weight, None if bias is None else bias[own], dtype)


def check(
    found: torch.Tensor, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """Within the rounding of the dtype and, in bfloat16, that of quantised inputs: half a step of each."""
    exact = given.double() @ weight.double().t()
    size = given.double().abs() @ weight.double().abs().t() + 1
    if bias is not None:
        exact, size = exact + bias.to(dtype).double(), size + bias.abs()
    allowed = exact.abs() * ROUNDING[dtype] + size * 2e-6
    if dtype == torch.bfloat16:
        largest = given.abs().amax().double()
        allowed = allowed + largest * QUANTISING * weight.double().norm(dim=1)
    worst = ((found.double() - exact).abs() / allowed).max()
    assert worst <= 1, worst
