"""Matrix products in C against float64, on this processor and as built for older ones."""

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
from ulysses_infer.native.choice import Choice
from ulysses_infer.native.library import NativeUnavailableError
from ulysses_infer.native.matmul import NativeMatmul, make_matmul

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}
SUMMING = 2e-6  # of the sum of absolute products


KERNELS = ("few", "pairs", "panels")


@pytest.fixture(params=X86)
def level(request):
    return request.param


def make_native(level, kernel):
    """Products by one kernel for any number of rows; skips those that the level does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "open_library", lambda name: build_for(name, level))
        return NativeMatmul(dict.fromkeys(DTYPES.values(), Choice({1: kernel})))


def pick(level, kernel, dtype):
    native = make_native(level, kernel)
    if kernel not in native.kernels[dtype]:
        pytest.skip(f"{level} has no {kernel} of {dtype}")
    return native


def check(native, rows, outputs, width, dtype, bias=False, stride=None, seed=0):
    """A product through the kernel is within rounding of the exact one; what surrounds the weight is NaN."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width, generator=generator).to(dtype)
    whole = torch.full((outputs, stride or width), float("nan"), dtype=dtype)
    start = whole.shape[1] - width
    weight = whole[:, start:]
    weight.copy_(torch.randn(outputs, width, generator=generator))
    added = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    result = native(inputs, weight, added)
    assert result.dtype == dtype
    assert result.shape == (rows, outputs)
    exact = F.linear(inputs.double(), weight.double(), None if added is None else added.double())
    size = F.linear(inputs.double().abs(), weight.double().abs()) + 1
    allowed = exact.abs() * ROUNDING[dtype] + size * SUMMING
    assert ((result.double() - exact).abs() <= allowed).all()
    return result


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_of_any_number_of_rows(level, kernel, dtype):
    native = pick(level, kernel, dtype)
    for rows in (*range(1, 18), 28, 33, 48, 64, 75, 96, 97, 400):
        check(native, rows, 29, 96, dtype, bias=rows % 2 == 0)


@settings(max_examples=60, deadline=None)
@given(
    level=st.sampled_from(X86),
    kernel=st.sampled_from(KERNELS),
    rows=st.integers(1, 20),
    outputs=st.integers(1, 110),
    width=st.integers(1, 600),
    beside=st.integers(0, 50),
    dtype=st.sampled_from(list(DTYPES.values())),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_row_stride(level, kernel, rows, outputs, width, beside, dtype, bias, seed):
    native = make_native(level, kernel)
    if kernel not in native.kernels[dtype]:
        native = make_native(level, "panels")
    check(native, rows, outputs, width, dtype, bias, width + beside, seed)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_does_not_depend_on_the_rows_beside_it(level, kernel, dtype):
    native = pick(level, kernel, dtype)
    inputs, weight = torch.randn(96, 300).to(dtype), torch.randn(61, 300).to(dtype)
    together = native(inputs, weight)
    for first, last in ((0, 1), (0, 28), (5, 37), (40, 81), (1, 96), (3, 16), (60, 76), (7, 9)):
        assert torch.equal(native(inputs[first:last], weight), together[first:last])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_do_not_depend_on_the_number_of_threads(level, kernel, dtype):
    native = pick(level, kernel, dtype)
    inputs, weight = torch.randn(5, 512).to(dtype), torch.randn(603, 512).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = native(inputs, weight)
    try:
        torch.set_num_threads(2)
        assert torch.equal(native(inputs, weight), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel", ["few", "panels"])
def test_infinities_and_nan_propagate(level, kernel):
    native = make_native(level, kernel)
    inputs, weight = torch.ones(2, 40).bfloat16(), torch.ones(3, 40).bfloat16()
    weight[0, 39], weight[1, 0] = float("inf"), float("nan")
    result = native(inputs, weight)
    assert result[:, 0].isinf().all()
    assert result[:, 1].isnan().all()
    assert result[:, 2].eq(40).all()


def test_leading_dimensions_are_kept_and_inputs_may_have_any_strides(level):
    native = make_native(level, "panels")
    inputs, weight = torch.randn(24, 7).t()[None], torch.randn(5, 24)
    result = native(inputs, weight)
    assert result.shape == (1, 7, 5)
    torch.testing.assert_close(result, F.linear(inputs, weight))


@pytest.mark.parametrize(
    ("inputs", "weight"),
    [
        (torch.randn(9, 8), torch.randn(4, 8)),
        (torch.randn(2, 8), torch.randn(8, 4).t()),
        (torch.randn(2, 8).double(), torch.randn(4, 8).double()),
        (torch.randn(0, 8), torch.randn(4, 8)),
    ],
    ids=["rows for which torch was chosen", "transposed weight", "float64", "no rows"],
)
def test_the_rest_is_left_to_torch(level, inputs, weight, monkeypatch):
    native = make_native(level, "few")
    native.choices[torch.float32] = Choice({1: "few", 9: "torch"})
    monkeypatch.setattr(matmul, "_multiply", None)
    assert torch.equal(native(inputs, weight), F.linear(inputs, weight))


def test_choices_of_another_rank_are_adopted_where_the_processor_has_their_kernels(level):
    native = make_native(level, "few")
    native.adopt({torch.bfloat16: Choice({1: "few", 8: "panels"}), torch.float32: Choice({1: "matrix units"})})
    assert native.choices[torch.bfloat16].kernels == {1: "few", 8: "panels"}
    assert native.choices[torch.float32].kernels == {1: "few"}


@pytest.mark.parametrize("level_of_halves", X86)
def test_float16_is_converted_as_torch_does(level_of_halves):
    """A weight of one element per output, times 1: every float16, to a float16."""
    native = make_native(level_of_halves, "panels")
    native.choices[torch.float16] = Choice({1: "panels"})
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    result = native(torch.ones(2, 1, dtype=torch.float16), every)[1]
    assert torch.equal(result.nan_to_num(7), every[:, 0].nan_to_num(7))
    scaled = native(torch.full((2, 1), 0.3, dtype=torch.float16), every)[1]
    assert torch.equal(scaled.nan_to_num(7), (every[:, 0].float() * torch.tensor(0.3).half()).half().nan_to_num(7))


def test_linear_uses_the_matmul_backend_of_the_step():
    inputs, weight = torch.randn(2, 8), torch.randn(4, 8)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))
    with step(FakeCollectives(), matmul=lambda *arguments: arguments):
        assert linear(inputs, weight) == (inputs, weight, None)
    with step(FakeCollectives(), matmul=None):
        assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))


def test_without_a_compiler_auto_is_torch_with_a_warning_and_native_is_refused(monkeypatch, caplog):
    def unavailable(name):
        raise NativeUnavailableError("no C compiler was found")

    monkeypatch.setattr(matmul, "open_library", unavailable)
    assert make_matmul("torch", CPU) is None
    assert not caplog.records
    assert make_matmul("auto", CPU) is None
    (record,) = caplog.records
    assert "no C compiler was found" in record.getMessage()
    assert "times as long" in record.getMessage()
    with pytest.raises(ConfigError, match="matmul_backend is native, but no C compiler was found; use auto"):
        make_matmul("native", CPU)


def test_the_kernel_runs_on_a_cpu_only():
    assert make_matmul("auto", torch.device("cuda")) is None
    with pytest.raises(ConfigError, match="runs on a CPU, not on cuda"):
        make_matmul("native", torch.device("cuda"))


@pytest.mark.parametrize(("kernel", "rows", "width"), [("pairs", 100, 8200), ("panels", 600, 520)])
def test_more_rows_than_are_transposed_at_a_time(level, kernel, rows, width):
    check(pick(level, kernel, torch.bfloat16), rows, 70, width, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("outputs", [(96, 24, 24), (61, 200), (5,), (7, 8, 9, 10)])
@pytest.mark.parametrize("rows", [3, 65, 700])
def test_joint_products_equal_separate_ones(level, dtype, outputs, rows):
    native = make_native(level, "panels")
    inputs = torch.randn(rows, 300).to(dtype)
    weights = [
        (torch.randn(size, 310).to(dtype)[:, 10:], torch.randn(size).to(dtype) if i % 2 else None)
        for i, size in enumerate(outputs)
    ]
    separate = [native(inputs, *each) for each in weights]
    assert all(map(torch.equal, native.joint(inputs, weights), separate))
