"""Products of sorted tokens with the dense matrices of their experts in C, against float64."""

from typing import Any

import pytest
import torch

from tests.native.building import ARM_LEVELS, X86, build_for
from ulysses_infer.native import experts as native_experts
from ulysses_infer.native.choice import Choice
from ulysses_infer.native.experts import NativeExperts

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}
SUMMING = 2e-6  # of the sum of absolute products
COUNTS = (1, 0, 3, 17, 0, 2, 40, 0)
"""Rows of each expert."""
KERNELS = [Choice({1: "few"}), Choice({1: "panels"}), Choice({1: "few", 4: "panels"})]


@pytest.fixture(params=[X86[0], *(pytest.param(level, marks=pytest.mark.thorough) for level in X86[1:]), *ARM_LEVELS])
def native(request: Any) -> NativeExperts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_experts, "open_library", lambda name: build_for(name, request.param))
        return NativeExperts()


def matrices_of(outputs: int, width: int, dtype: torch.dtype, is_transposed: bool) -> torch.Tensor:
    """[E, outputs, width], a view with values that are not numbers around each matrix."""
    shape = (len(COUNTS), width, outputs + 5) if is_transposed else (len(COUNTS), outputs + 1, width + 5)
    whole = torch.full(shape, float("nan"), dtype=dtype)
    matrices = whole[:, :, 3:-2].transpose(1, 2) if is_transposed else whole[:, :-1, 3:-2]
    matrices.copy_(torch.randn(matrices.shape))
    return matrices


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("outputs", "width"), [(53, 70), (8, 301), (600, 32)])
def test_each_row_is_multiplied_by_its_experts_matrix(
    native: NativeExperts, dtype: torch.dtype, outputs: int, width: int, is_transposed: bool
) -> None:
    torch.manual_seed(outputs)
    matrices = matrices_of(outputs, width, dtype, is_transposed)
    bias = torch.randn(len(COUNTS), outputs + 2).to(dtype)[:, :outputs]
    ends = torch.tensor(COUNTS).cumsum(0).to(torch.int32)
    tokens = torch.randn(sum(COUNTS) + 4, width + 3).to(dtype)[:, 3:]  # the last rows are of experts of other ranks
    experts = torch.repeat_interleave(torch.tensor(COUNTS))
    chosen, own = matrices[experts].double(), tokens[: sum(COUNTS)].double()
    exact = torch.einsum("snk,sk->sn", chosen, own) + bias[experts].double()
    size = torch.einsum("snk,sk->sn", chosen.abs(), own.abs()) + 2
    for choice in [KERNELS[0]] if is_transposed else KERNELS:
        found = native.multiply(tokens, matrices, bias, ends, choice)
        assert found.shape == (len(tokens), outputs)
        error = (found[: len(own)].double() - exact).abs()
        assert (error <= exact.abs() * ROUNDING[dtype] + size * SUMMING).all(), choice.kernels


def test_pairs_are_multiplied_as_panels_are_with_or_without_an_instruction_for_them() -> None:
    native, width = NativeExperts(), 64
    matrices, tokens = torch.randn(2, 40, width).bfloat16(), torch.randn(60, width).bfloat16()
    ends = torch.tensor([20, 60], dtype=torch.int32)
    found, same = (
        native.multiply(tokens, matrices, None, ends, Choice({1: name})).double() for name in ("pairs", "panels")
    )
    torch.testing.assert_close(found, same, rtol=2**-7, atol=1e-3)


def test_no_rows_and_no_experts_are_no_error() -> None:
    native, choice = NativeExperts(), Choice({1: "few"})
    for experts in (0, 3):
        ends = torch.zeros(experts, dtype=torch.int32)
        found = native.multiply(torch.empty(0, 8), torch.empty(experts, 5, 8), None, ends, choice)
        assert found.shape == (0, 5)


def test_other_layouts_are_not_served() -> None:
    native, tokens = NativeExperts(), torch.empty(3, 8)
    assert native.serves(tokens, torch.empty(2, 5, 8))
    assert native.serves(tokens, torch.empty(2, 8, 5).transpose(1, 2))
    assert not native.serves(tokens, torch.empty(2, 5, 16)[:, :, ::2])
    assert not native.serves(tokens, torch.empty(2, 5, 8).bfloat16())
    assert not native.serves(tokens.double(), torch.empty(2, 5, 8).double())
