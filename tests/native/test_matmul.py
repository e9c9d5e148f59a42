"""Products of few rows in C against float64, on this processor and as built for older ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.model.fake_step import FakeCollectives, step
from tests.native.building import X86, build_for
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.native import matmul
from ulysses_infer.native.library import NativeUnavailableError
from ulysses_infer.native.matmul import NativeMatmul, make_matmul

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 0.0}
SUMMING = 2e-6  # of the sum of absolute products


@pytest.fixture(params=X86)
def native(request, monkeypatch):
    return make_native(request.param)


def make_native(architecture):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "open_library", lambda name: build_for(name, architecture))
        return NativeMatmul()


def check(native, rows, outputs, width, dtype, bias=False, stride=None, seed=0):
    """A product through the kernel is within rounding of the exact one; what surrounds the weight is NaN."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width, generator=generator).to(dtype)
    whole = torch.full((outputs, stride or width), float("nan"), dtype=dtype)
    start = whole.shape[1] - width
    weight = whole[:, start:]
    weight.copy_(torch.randn(outputs, width, generator=generator))
    added = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    native.most_rows = dict.fromkeys(DTYPES.values(), 1000)
    result = native(inputs, weight, added)
    assert result.dtype == dtype
    assert result.shape == (rows, outputs)
    exact = F.linear(inputs.double(), weight.double(), None if added is None else added.double())
    size = F.linear(inputs.double().abs(), weight.double().abs()) + 1
    allowed = exact.abs() * ROUNDING[dtype] + size * SUMMING
    assert ((result.double() - exact).abs() <= allowed).all()
    return result


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 18), 28, 33, 48, 64, 75, 96, 97, 400])
def test_products_of_any_number_of_rows(native, rows, dtype):
    check(native, rows, 29, 96, dtype, bias=rows % 2 == 0)


@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(X86),
    rows=st.integers(1, 20),
    outputs=st.integers(1, 70),
    width=st.integers(1, 200),
    beside=st.integers(0, 50),
    dtype=st.sampled_from(list(DTYPES.values())),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_row_stride(architecture, rows, outputs, width, beside, dtype, bias, seed):
    check(make_native(architecture), rows, outputs, width, dtype, bias, width + beside, seed)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(native, dtype):
    inputs, weight = torch.randn(40, 300).to(dtype), torch.randn(37, 300).to(dtype)
    native.most_rows = dict.fromkeys(DTYPES.values(), 1000)
    alone = torch.cat([native(row[None], weight) for row in inputs])
    for rows in (2, 3, 5, 8, 11, 20):
        assert torch.equal(torch.cat([native(part, weight) for part in inputs.split(rows)]), alone)


def test_many_bfloat16_rows_do_not_depend_on_one_another(native):
    inputs, weight = torch.randn(96, 300).bfloat16(), torch.randn(61, 300).bfloat16()
    native.most_rows = dict.fromkeys(DTYPES.values(), 1000)
    together = native(inputs, weight)
    for first, last in ((0, 28), (5, 37), (40, 81), (1, 96), (3, 16), (60, 76)):
        assert torch.equal(native(inputs[first:last], weight), together[first:last])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(native, dtype):
    inputs, weight = torch.randn(5, 512).to(dtype), torch.randn(603, 512).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = native(inputs, weight)
    try:
        torch.set_num_threads(2)
        assert torch.equal(native(inputs, weight), one)
    finally:
        torch.set_num_threads(threads)


def test_infinities_and_nan_propagate(native):
    inputs, weight = torch.ones(2, 40).bfloat16(), torch.ones(3, 40).bfloat16()
    weight[0, 39], weight[1, 0] = float("inf"), float("nan")
    result = native(inputs, weight)
    assert result[:, 0].isinf().all()
    assert result[:, 1].isnan().all()
    assert result[:, 2].eq(40).all()


def test_leading_dimensions_are_kept_and_inputs_may_have_any_strides(native):
    inputs, weight = torch.randn(24, 7).t()[None], torch.randn(5, 24)
    result = native(inputs, weight)
    assert result.shape == (1, 7, 5)
    torch.testing.assert_close(result, F.linear(inputs, weight))


def untouchable(*arguments):
    raise AssertionError("the kernel was called")


@pytest.mark.parametrize(
    ("inputs", "weight"),
    [
        (torch.randn(1000, 8), torch.randn(4, 8)),
        (torch.randn(2, 8), torch.randn(8, 4).t()),
        (torch.randn(2, 8).half(), torch.randn(4, 8).half()),
    ],
    ids=["many rows", "transposed weight", "float16"],
)
def test_unsupported_inputs_fall_back_to_torch(native, inputs, weight):
    native._functions = dict.fromkeys(DTYPES.values(), untouchable)
    assert torch.equal(native(inputs, weight), F.linear(inputs, weight))


def test_linear_uses_the_matmul_backend_of_the_step():
    inputs, weight = torch.randn(2, 8), torch.randn(4, 8)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))
    with step(FakeCollectives(), matmul=lambda *arguments: arguments):
        assert linear(inputs, weight) == (inputs, weight, None)
    with step(FakeCollectives(), matmul=None):
        assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))


def test_without_a_compiler_auto_is_torch_and_native_is_refused(monkeypatch):
    def unavailable(name):
        raise NativeUnavailableError("no C compiler was found")

    monkeypatch.setattr(matmul, "open_library", unavailable)
    monkeypatch.setattr(matmul, "is_available", lambda name: False)
    assert make_matmul("auto", CPU) is None
    assert make_matmul("torch", CPU) is None
    with pytest.raises(ConfigError, match="matmul_backend is native, but no C compiler was found; use auto"):
        make_matmul("native", CPU)


def test_the_kernel_runs_on_a_cpu_only():
    assert make_matmul("auto", torch.device("cuda")) is None
    with pytest.raises(ConfigError, match="runs on a CPU, not on cuda"):
        make_matmul("native", torch.device("cuda"))


def test_more_rows_than_are_transposed_at_a_time(native):
    check(native, 100, 70, 8200, torch.bfloat16)
