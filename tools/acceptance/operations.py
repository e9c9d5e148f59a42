"""The other kernels of a layer against plain torch: norms, activations, quantisation, FP8 products, experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from tools.acceptance.check import Result, Settings, SkippedError, at_most, skipped
from ulysses_infer.kernels.launch import has_fp8, runs_kernels
from ulysses_infer.kernels.scaled_rows import GROUPED, NONE, ROW, QuantisedRows
from ulysses_infer.model.fusion.torch_elementwise import TorchElementwise
from ulysses_infer.model.quantization.products import DequantisedProduct, Piece, choose_product
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.parallel.layout import Span

DTYPE = torch.bfloat16
EPSILON = 1e-5
BLOCK = 128
ROUNDING = 0.02
"""Mean difference relative to the mean value, of a few roundings to bfloat16."""
FP8_ROUNDING = 0.06
"""The same of one rounding to e4m3, which has three bits of mantissa."""


def check_operations(settings: Settings) -> Iterator[Result]:
    """The relative mean difference of each kernel."""
    device = settings.device
    if not runs_kernels(device):
        raise SkippedError("Triton kernels run on GPUs")
    rows, width = (3, 256) if settings.quick else (37, 4096)
    x, residual = (random(device, seed, rows, width) for seed in (0, 1))
    yield from _norms(x, residual)
    yield from _activations(x, residual)
    if not has_fp8(device):
        yield skipped("FP8 kernels", "the GPU has no FP8")
        return
    yield from _quantisation(x)
    yield from _products(x, width if settings.quick else 2 * width)
    yield from _experts(x, 4)


def random(device: torch.device, seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, DTYPE)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean difference relative to the mean value."""
    return float((found.float() - expected.float()).abs().mean() / expected.float().abs().mean())


def dequantised(rows: QuantisedRows) -> torch.Tensor:
    """[rows, K] float32."""
    values, scales = rows.values[: rows.num_rows].float(), rows.scales[: rows.num_rows]
    return values * (scales if rows.kind == ROW else scales.repeat_interleave(BLOCK, dim=1))


def _norms(x: torch.Tensor, residual: torch.Tensor) -> Iterator[Result]:
    from ulysses_infer.kernels.norm import rms_norm

    weight = random(x.device, 2, x.shape[1])
    total, expected = TorchElementwise(DTYPE).add_rms_norm(x, residual, weight, EPSILON)
    own = residual.clone()
    found = rms_norm(x, weight, EPSILON, own)
    assert isinstance(found, torch.Tensor)
    yield at_most("residual and norm: difference", max(difference(found, expected), difference(own, total)), ROUNDING)
    for name, kind in (("row", ROW), ("group", GROUPED)) if has_fp8(x.device) else ():
        rows = rms_norm(x, weight, EPSILON, residual.clone(), kind)
        assert isinstance(rows, QuantisedRows)
        yield at_most(
            f"residual, norm, FP8 per {name}: difference", difference(dequantised(rows), expected), FP8_ROUNDING
        )


def _activations(gate: torch.Tensor, up: torch.Tensor) -> Iterator[Result]:
    from ulysses_infer.kernels.activation import gated

    expected = F.silu(gate) * up
    found = gated("silu", gate[:, None], up[:, None])
    assert isinstance(found, torch.Tensor)
    yield at_most("gated activation: difference", difference(found, expected), ROUNDING)


def _quantisation(x: torch.Tensor) -> Iterator[Result]:
    from ulysses_infer.kernels.quantisation import quantise

    for name, kind in (("row", ROW), ("group", GROUPED)):
        yield at_most(f"FP8 per {name}: difference", difference(dequantised(quantise(x, kind)), x), FP8_ROUNDING)


def _products(x: torch.Tensor, outputs: int) -> Iterator[Result]:
    """On tensor cores, against the same weights dequantised."""
    channel = ScaledWeight("weight_scale", "channel")
    block = ScaledWeight("weight_scale_inv", "block", (BLOCK, BLOCK))
    for name, scheme in (("channel", channel), ("block", block)):
        piece = _piece(scheme, outputs, x.shape[1], x.device)
        product = choose_product(scheme, piece)
        if product.input_kind == NONE:
            yield skipped(f"product, FP8 per {name}", "this GPU and torch dequantise such weights")
            continue
        found, expected = product(x, piece), DequantisedProduct(scheme)(x, piece)
        yield at_most(f"product, FP8 per {name}: difference", difference(found, expected), FP8_ROUNDING)


def _piece(scheme: ScaledWeight, outputs: int, inputs: int, device: torch.device) -> Piece:
    components = scheme.components(outputs, inputs)
    weight = random(device, 3, outputs, inputs).to(torch.float8_e4m3fn)
    scales = random(device, 4, *components[scheme.scale_name].shape).float().abs() * 0.01 + 0.001
    parts = {"weight": weight, scheme.scale_name: scales}
    return Piece(Span(0, outputs), Span(0, inputs), components, parts, None)


def _experts(x: torch.Tensor, num_experts: int) -> Iterator[Result]:
    """The grouped product over FP8 weights; the third expert gets no token."""
    from ulysses_infer.kernels.experts import grouped_product
    from ulysses_infer.kernels.experts_weights import StoredExperts

    rows, width = x.shape
    ends = [1, rows - 1, rows - 1, rows][:num_experts]
    codes = random(x.device, 5, num_experts, 64, width).to(torch.float8_e4m3fn)
    scales = random(x.device, 6, num_experts, 64, 1).float().abs() + 0.01
    offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
    found = grouped_product(x, offsets, StoredExperts(codes, 64, width, scales=scales))
    expert_of_row = [next(e for e, end in enumerate(ends) if row < end) for row in range(rows)]
    weights = codes.float() * scales
    expected = torch.stack([weights[expert] @ x[row].float() for row, expert in enumerate(expert_of_row)])
    yield at_most("experts, FP8 per channel: difference", difference(found, expected), ROUNDING)
