"""RMS norm, quantisation and gated activations in Triton equal torch's operations one after another."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import use_exact_rounding
from ulysses_infer.kernels import activation, norm, quantisation
from ulysses_infer.kernels.scaled_rows import ALIGNED_ROWS, GROUP, GROUPED, NONE, ROW, QuantisedRows
from ulysses_infer.model.fusion.torch_elementwise import TorchElementwise
from ulysses_infer.model.quantization.products import quantised_tokens

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _exact() -> None:
    use_exact_rounding()


def check_quantised(found: QuantisedRows, expected: torch.Tensor, kind: int) -> None:
    """`found` is `expected` quantised; the reduction order may flip a rounding of a few values before that."""
    values, scales = found.values, found.scales
    assert (found.kind, found.shape, found.dtype) == (kind, expected.shape, expected.dtype)
    wanted, wanted_scales = quantised_tokens(expected, expected.shape[1] if kind == ROW else GROUP)
    rows = len(expected)
    assert scales.shape == (len(values), wanted_scales.shape[1])
    torch.testing.assert_close(scales[:rows], wanted_scales, rtol=1e-2, atol=0)
    size = expected.shape[1] // wanted_scales.shape[1]
    dense = values[:rows].float() * scales[:rows].repeat_interleave(size, 1)
    reference = wanted.float() * wanted_scales.repeat_interleave(size, 1)
    assert (dense - reference).abs().mean() <= 2e-3 * reference.abs().mean()
    if kind == GROUPED:
        assert scales.stride(0) == 1
        assert len(values) % ALIGNED_ROWS == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 256])
@pytest.mark.parametrize("add", [False, True])
def test_norm(dtype: torch.dtype, width: int, add: bool) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, width + 8)[:, :width], torch.randn(3, width), torch.rand(width)
    x, residual, weight = x.to(dtype), residual.to(dtype), weight.to(dtype)
    reference = TorchElementwise(dtype)
    if add:
        total, expected = reference.add_rms_norm(x, residual, weight, 1e-5)
        found = norm.rms_norm(x, weight, 1e-5, residual)
        assert torch.equal(residual, total)
    else:
        expected = reference.rms_norm(x, weight, 1e-5)
        found = norm.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [ROW, GROUPED])
def test_norm_with_quantisation(dtype: torch.dtype, kind: int) -> None:
    torch.manual_seed(1)
    x, residual, weight = torch.randn(5, 384).to(dtype), torch.randn(5, 384).to(dtype), torch.rand(384).to(dtype)
    _, expected = TorchElementwise(dtype).add_rms_norm(x, residual, weight, 1e-6)
    check_quantised(norm.rms_norm(x, weight, 1e-6, residual, kind), expected, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [ROW, GROUPED])
@pytest.mark.parametrize("width", [256, 1408])
def test_quantisation_is_bitwise_equal(dtype: torch.dtype, kind: int, width: int) -> None:
    torch.manual_seed(2)
    rows = torch.randn(6, width + 16)[:, :width].to(dtype) * torch.tensor([1, 0, 100, 1e-3, 1, 1])[:, None].to(dtype)
    wanted, wanted_scales = quantised_tokens(rows, width if kind == ROW else GROUP)
    found = quantisation.quantise(rows, kind)
    values, scales = found.values, found.scales
    assert torch.equal(scales[:6], wanted_scales)
    assert torch.equal(values[:6].view(torch.uint8), wanted.view(torch.uint8))


def test_long_rows_are_quantised_in_several_parts() -> None:
    rows = torch.randn(2, 3 * quantisation.TILE * GROUP + 40, dtype=torch.bfloat16)
    wanted, wanted_scales = quantised_tokens(rows, rows.shape[1])
    found = quantisation.quantise(rows, ROW)
    values, scales = found.values, found.scales
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shards", [1, 3])
def test_gated(dtype: torch.dtype, name: str, shards: int) -> None:
    torch.manual_seed(3)
    both = torch.randn(4, shards, 2 * 24).to(dtype) * 3
    gate, up = both.chunk(2, dim=-1)
    expected = TorchElementwise(dtype).gated(name, gate, up).flatten(1)
    found = activation.gated(name, gate, up, NONE)
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=1e-5)


@pytest.mark.parametrize("kind", [ROW, GROUPED])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [192, 2304])
def test_gated_with_quantisation(kind: int, name: str, size: int) -> None:
    torch.manual_seed(4)
    gate, up = torch.randn(3, 2, 2 * size).bfloat16().chunk(2, dim=-1)
    expected = TorchElementwise(torch.bfloat16).gated(name, gate, up).flatten(1)
    check_quantised(activation.gated(name, gate, up, kind), expected, kind)
