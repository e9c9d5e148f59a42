"""Products with quantised weights in C, of every format and slice, on this processor and as built for older ones."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model.fake_step import FakeCollectives, step
from tests.model.quantization.checkpoints import compressed, float_zeros, int8_channel
from tests.model.quantization.mixtures import mxfp4
from tests.model.quantization.test_component import GRAINS, loaded
from tests.native.building import X86_OF_LARGE, build_for
from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.model.quantization import native_products, products
from ulysses_infer.model.quantization.component import covering
from ulysses_infer.model.quantization.float_zeros import FloatZeroWeight
from ulysses_infer.model.quantization.mxfp4 import Mxfp4Weight
from ulysses_infer.model.quantization.online import online_scheme
from ulysses_infer.model.quantization.packed import CompressedWeight
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.parallel.layout import Layout, Mode, Span
from ulysses_infer.parallel.sharding import Part, Sharding

LAYOUT, SHARD = Layout(Mode(2, 2)), 3
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2e-6}
FP8_CHANNELS = ScaledWeight("s", "channel")
QUANTISING = 1 / 127
"""Error of a quantised input relative to the largest one of its segment."""


@pytest.fixture(params=X86_OF_LARGE, autouse=True)
def architecture(request: Any, monkeypatch: Any) -> Any:
    native_products._functions.cache_clear()
    monkeypatch.setattr(native_products, "most_rows", lambda bits: 3)  # more rows are multiplied by the other kernel
    monkeypatch.setattr(native_products, "most_float_rows", lambda dtype, matmul: 50)
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


@st.composite
def cases(draw: Any) -> tuple[Any, Span, Span, int, int]:
    """A scheme, outputs and inputs of a slice of a layer with 300 inputs, rows, and inputs per segment."""
    schemes = [(float_zeros(size), FloatZeroWeight(size)) for size in (8, 12, 32, 64, 128)]
    schemes += [(compressed(size, symmetric=False), CompressedWeight(size, 4, False)) for size in (32, 128)]
    schemes += [(int8_channel, ScaledWeight("weight_scale", "channel", dtype=torch.int8)), (mxfp4, Mxfp4Weight())]
    first, start = draw(st.integers(0, 20)), draw(st.sampled_from((0, 8, 32, 64, 136)))
    rows = Span(first, first + draw(st.integers(1, 75)))
    columns = Span(start, draw(st.integers(start + 1, 288)))
    return draw(st.sampled_from(schemes)), rows, columns, draw(st.integers(1, 30)), draw(st.sampled_from((32, 64)))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_slices_of_any_size_equal_those_of_dense_weights(case: Any) -> None:
    (quantise, scheme), rows, columns, count, segment = case
    weights, dense = weights_of(quantise, scheme, rows, columns, segment)
    given_rows = torch.randn(count, columns.size).bfloat16()
    check(weights.product(given_rows, None), given_rows, dense, None, torch.bfloat16, float(dense.abs().max()))


def weights_of(
    quantise: Any, scheme: Any, rows: Span, columns: Span, segment: int, inputs: int = 288
) -> tuple[native_products.NativeWeights, torch.Tensor]:
    """A slice of a random layer with 96 outputs, and what it is worth, [rows, columns]."""
    outputs = 96
    tensors, dense = quantise(torch.randn(outputs, inputs) + 0.5)
    names = {"_blocks": "blocks", "_scales": "scales"}
    stored = {names.get(name, name): part for name, part in tensors.items()}
    parts = {}
    for name, component in scheme.components(outputs, inputs).items():
        view = stored[name].to(component.dtype).view(component.shape)
        for axis, span in ((component.outputs, rows), (component.inputs, columns)):
            if axis is not None:
                kept = covering(span, axis.step)
                view = view.narrow(axis.dimension, kept.start, kept.size)
        parts[name] = view[None]
    weights = native_products.NativeWeights(scheme.stored_experts(parts, rows, columns), segment)
    return weights, dense[slice(*rows), slice(*columns)]


NIBBLES = {
    "float zeros, groups of 32": (float_zeros(32), FloatZeroWeight(32)),
    "float zeros, groups of 128": (float_zeros(128), FloatZeroWeight(128)),
    "symmetric, groups of 64": (compressed(64, symmetric=True), CompressedWeight(64)),
}


@pytest.mark.parametrize("columns", [Span(0, 1120), Span(32, 1088), Span(64, 99)], ids=str)
@pytest.mark.parametrize("name", NIBBLES)
def test_few_rows_of_nibbles_equal_many(name: str, columns: Span) -> None:
    """Lanes that are inputs, and lanes that are outputs."""
    torch.manual_seed(0)
    weights, dense = weights_of(*NIBBLES[name], Span(3, 90), columns, 64, inputs=1120)
    bias = torch.randn(len(dense)).bfloat16()
    for rows in (1, 2, 3, 4, 7):
        given = torch.randn(rows, columns.size).bfloat16()
        few, many = (weights.multiply(given, bias, by_rows) for by_rows in (rows, 0))
        check(few, given, dense, bias, torch.bfloat16, float(dense.abs().max()))
        torch.testing.assert_close(few, many, rtol=2**-7, atol=1e-4)


def test_few_rows_of_nibbles_do_not_depend_on_the_next_output() -> None:
    """Its scales follow in memory."""
    scheme = FloatZeroWeight(128)
    parts = {name: part[None] for name, part in random_parts(scheme, 50, 672).items()}
    weights = native_products.NativeWeights(scheme.stored_experts(parts, Span(0, 50), Span(0, 672)))
    given = torch.randn(2, 672).bfloat16()
    before = weights.multiply(given, None, 2)
    parts["weight_scale"][:, 1::2] = torch.nan
    after = weights.multiply(given, None, 2)
    assert after[:, ::2].equal(before[:, ::2])
    assert after[:, 1::2].isnan().all()


@pytest.mark.parametrize("outputs", [1, 31, 33, 65, 96, 130, 257])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_rows_equal_many_with_any_number_of_outputs(kind: str, outputs: int) -> None:
    """Outputs are read in several streams, of which the last may be short or empty."""
    torch.manual_seed(outputs)
    scheme, width = online_scheme(kind, 32 if kind == "int4" else 0), 544
    dense, bias = torch.randn(outputs, width), torch.randn(outputs).bfloat16()
    parts = {name: part[None] for name, part in scheme.quantise(dense).items()}
    weights = native_products.NativeWeights(scheme.stored_experts(parts, Span(0, outputs), Span(0, width)))
    for rows in (1, 2, 3, 4, 5):
        given = torch.randn(rows, width).bfloat16()
        few, many = (weights.multiply(given, bias, by_rows) for by_rows in (rows, 0))
        torch.testing.assert_close(few, many, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("inputs", [64, 76, 200])
def test_integers_are_multiplied_exactly(rows: int, inputs: int) -> None:
    """Inputs that are multiples of their segment's step need no rounding, and sums are below 2^24."""
    codes = torch.randint(-127, 128, (37, inputs), dtype=torch.int8)
    codes[0], codes[1] = 127, -127
    given_rows = torch.randint(-127, 128, (rows, inputs)).float()
    given_rows[:, ::32], given_rows[-1] = 127, -127
    stored = StoredExperts(codes[None], 37, inputs, scales=torch.ones(1, 37, 1))
    output = torch.empty(rows, 37)
    weights = native_products.NativeWeights(stored, 32)
    weights._product(ctypes.byref(weights._struct), given_rows.data_ptr(), None, output.data_ptr(), rows, inputs, 0, 3)
    assert output.tolist() == (given_rows @ codes.float().t()).tolist()


@pytest.mark.parametrize("scheme", [FloatZeroWeight(32), ScaledWeight("s", "channel", dtype=torch.int8)], ids=str)
def test_a_row_does_not_depend_on_how_many_others_there_are(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_products, "most_rows", lambda bits: 0)
    parts = {name: part[None] for name, part in random_parts(scheme, 50, 160).items()}
    weights = native_products.NativeWeights(scheme.stored_experts(parts, Span(0, 50), Span(0, 160)))
    given_rows = torch.randn(23, 160).bfloat16()
    together = weights.product(given_rows, None)
    for count in (1, 2, 7, 12):
        assert weights.product(given_rows[:count], None).equal(together[:count])


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [(FloatZeroWeight(32), [4]), (ScaledWeight("s", "channel", dtype=torch.int8), [8]), (FP8_CHANNELS, [])],
    ids=str,
)
def test_kernels_are_measured_while_weights_are_loaded(
    scheme: Any, bits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    monkeypatch.setattr(native_products, "most_rows", measured.append)
    parts = {name: part[None] for name, part in random_parts(scheme, 50, 160).items()}
    assert native_products.native_weights(scheme.stored_experts(parts, Span(0, 50), Span(0, 160))) is not None
    assert measured == bits


def random_parts(scheme: Any, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    """The components of a layer."""
    found = {}
    for name, component in scheme.components(outputs, inputs).items():
        is_code = not component.dtype.is_floating_point
        values = torch.randint(-120, 120, component.shape) if is_code else torch.rand(component.shape)
        found[name] = values.to(component.dtype)
    return found


def check(
    found: torch.Tensor,
    given: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    most: float = 0,
) -> None:
    """Within the rounding of the dtype and, in bfloat16, that of quantised inputs: half a step of each.

    most: the largest weight, to which the rounding of what zero points subtract is relative.
    """
    exact = given.double() @ weight.double().t()
    size = given.double().abs() @ (weight.double().abs() + most).t() + 1
    if bias is not None:
        exact, size = exact + bias.to(dtype).double(), size + bias.abs()
    allowed = exact.abs() * ROUNDING[dtype] + size * 2e-6
    if dtype == torch.bfloat16:
        largest = given.abs().amax().double()
        allowed = allowed + largest * QUANTISING * weight.double().norm(dim=1)
    worst = ((found.double() - exact).abs() / allowed).max()
    assert worst <= 1, worst
