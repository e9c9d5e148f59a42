"""Products with quantised weights: those of the FP8 tensor cores, whose arithmetic torch also has on a CPU."""

from __future__ import annotations

import pytest
import torch

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_prompts, token_logprobs
from tests.model.quantization.checkpoints import FORMATS, fp8_block, fp8_channel, fp8_tensor, make_quantised
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.model.quantization import products
from ulysses_infer.model.quantization.component import Component
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.products import (
    BLOCK,
    FP8_MAX,
    TILES,
    BlockScaledProduct,
    DequantisedProduct,
    NativeProduct,
    Piece,
    RowScaledProduct,
    choose_product,
    is_aligned,
    padded_blocks,
    quantised_tokens,
)
from ulysses_infer.model.quantization.scaled import ScaledWeight, widened
from ulysses_infer.parallel.layout import Span

OUTPUTS, INPUTS = 256, 512


def piece_of(scheme, tensors, rows, columns, bias=None):
    """Views of the whole layer's tensors."""
    components = scheme.components(OUTPUTS, INPUTS)
    parts = {}
    for name, component in components.items():
        whole = tensors[name].float() if component.dtype == torch.float32 else tensors[name]
        whole = whole.reshape(component.shape)
        kept = component.view(whole, "column", [Span(0, OUTPUTS)], rows)
        parts[name] = component.view(kept, "row", [Span(0, INPUTS)], columns)
    return Piece(rows, columns, components, parts, bias)


ROW_SCALED = {
    "channel": (fp8_channel, ScaledWeight("weight_scale", "channel")),
    "tensor": (fp8_tensor("weight_scale", ()), ScaledWeight("weight_scale", "tensor")),
}
SLICES = [(Span(0, 256), Span(0, 512)), (Span(64, 128), Span(0, 512)), (Span(0, 256), Span(128, 256))]


@pytest.mark.parametrize(("rows", "columns"), SLICES, ids=["whole", "outputs", "inputs"])
@pytest.mark.parametrize("grain", ROW_SCALED)
@pytest.mark.parametrize("tokens", [1, 7])
def test_row_scaled_product_of_a_view_equals_the_dequantised_one(grain, rows, columns, tokens):
    quantise, scheme = ROW_SCALED[grain]
    tensors, dense = quantise(torch.randn(OUTPUTS, INPUTS) / 16)
    bias = torch.randn(rows.size, dtype=torch.bfloat16)
    piece = piece_of(scheme, tensors, rows, columns, bias)
    inputs = torch.randn(1, tokens, columns.size, dtype=torch.bfloat16)
    expected = inputs.float() @ dense[slice(*rows), slice(*columns)].t() + bias.float()
    found = RowScaledProduct(scheme)(inputs, piece)
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    # Activations have three bits of mantissa: errors of 1/16 per value, which average out over a sum.
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    exact = DequantisedProduct(scheme)(inputs.float(), piece)
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=1e-4)


def test_scaled_operands_are_views_of_the_stored_weight(monkeypatch):
    scheme = ScaledWeight("weight_scale", "channel")
    tensors, _ = fp8_channel(torch.randn(OUTPUTS, INPUTS))
    seen = []
    multiply = torch._scaled_mm

    def noted(values, weight, *scales, **options):
        seen.append(weight)
        return multiply(values, weight, *scales, **options)

    monkeypatch.setattr(torch, "_scaled_mm", noted)
    RowScaledProduct(scheme)(torch.randn(2, 128), piece_of(scheme, tensors, Span(0, 256), Span(128, 256)))
    (operand,) = seen
    assert operand.untyped_storage().data_ptr() == tensors["weight"].untyped_storage().data_ptr()
    assert (operand.shape, operand.stride()) == ((128, OUTPUTS), (1, INPUTS))


@pytest.mark.parametrize(("rows", "columns"), [(Span(0, 256), Span(0, 512)), (Span(128, 256), Span(128, 384))])
def test_block_scaled_operands_have_the_layout_that_torch_asks_for(rows, columns, monkeypatch):
    """torch checks shapes and strides of all four on the meta device; what they mean is checked here by hand."""
    scheme = ScaledWeight("weight_scale_inv", "block", (BLOCK, BLOCK))
    tensors, dense = fp8_block((BLOCK, BLOCK))(torch.randn(OUTPUTS, INPUTS) / 16)
    piece, inputs = piece_of(scheme, tensors, rows, columns), torch.randn(3, columns.size)

    def scaled_mm(values, weight, scales, recipe, blocks, block_recipe, output_dtype):
        kinds = [torch.nn.functional.ScalingType.BlockWise1x128, torch.nn.functional.ScalingType.BlockWise128x128]
        assert [recipe, block_recipe] == kinds
        operands = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (values, weight)]
        found = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in (scales, blocks)]
        real(operands[0], operands[1], found[0], recipe, found[1], block_recipe, output_dtype=output_dtype)
        wide = values.float() * scales.repeat_interleave(BLOCK, 1)
        own = blocks[: columns.size // BLOCK].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return (wide @ (weight.float() * own)).to(output_dtype)

    real = torch.nn.functional.scaled_mm
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    found = BlockScaledProduct(scheme)(inputs.bfloat16(), piece).float()
    expected = inputs @ dense[slice(*rows), slice(*columns)].t()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_tokens_are_quantised_by_their_own_largest_value():
    rows = torch.randn(5, 256)
    rows[2] = 0
    rows[3] *= 1e4
    values, scales = quantised_tokens(rows, 128)
    assert scales.shape == (5, 2)
    dense = values.float().view(5, 2, 128) * scales[..., None]
    assert values.float().abs().max() == FP8_MAX
    assert not dense[2].any()
    within = rows.view(5, 2, 128).abs() / 16 + scales[..., None] * 2**-9
    assert ((dense - rows.view(5, 2, 128)).abs() <= within).all()


@pytest.mark.parametrize("blocks", [3, 4, 40])
def test_block_scales_are_padded_to_a_multiple_of_four(blocks):
    scale = torch.rand(2, blocks + 1)[:, :blocks]
    padded = padded_blocks(scale)
    assert padded.is_contiguous()
    assert padded.shape[1] % 4 == 0
    assert torch.equal(padded[:, :blocks], scale)


@pytest.mark.parametrize(
    ("rows", "columns", "aligned"),
    [
        (Span(0, 256), Span(0, 512), True),
        (Span(16, 32), Span(0, 512), True),
        (Span(0, 256), Span(16, 64), True),
        (Span(0, 8), Span(0, 512), False),
        (Span(0, 256), Span(8, 40), False),
        (Span(0, 256), Span(0, 24), False),
    ],
)
def test_tensor_cores_need_multiples_of_sixteen(rows, columns, aligned):
    weight = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float8_e4m3fn)
    assert is_aligned(weight[slice(*rows), slice(*columns)]) == aligned


def test_a_cpu_multiplies_what_is_stored():
    scheme = ScaledWeight("weight_scale", "channel")
    tensors, _ = fp8_channel(torch.randn(OUTPUTS, INPUTS))
    piece = piece_of(scheme, tensors, Span(0, 256), Span(0, 512))
    assert isinstance(choose_product(scheme, piece), NativeProduct)


def test_no_more_than_a_tile_is_dequantised_at_a_time(monkeypatch):
    sizes = []
    dequantise = ScaledWeight.dequantise

    def noted(self, parts, rows, columns):
        sizes.append(rows.size * columns.size)
        return dequantise(self, parts, rows, columns)

    monkeypatch.setattr(ScaledWeight, "dequantise", noted)
    scheme = ScaledWeight("weight_scale", "channel")
    components = scheme.components(3000, 1024)
    parts = {name: torch.zeros(c.shape).to(c.dtype) for name, c in components.items()}
    DequantisedProduct(scheme)(torch.zeros(2, 1024), Piece(Span(0, 3000), Span(0, 1024), components, parts, None))
    assert sum(sizes) == 3000 * 1024
    assert max(sizes) <= TILES["cpu"]


def test_one_index_per_feature_is_the_default():
    component = Component((4,), torch.float32)
    assert component.axis("row") is None


@pytest.mark.parametrize(
    ("grain", "rows", "columns", "hopper", "kind"),
    [
        ("channel", Span(0, 256), Span(128, 256), False, RowScaledProduct),
        ("tensor", Span(16, 32), Span(0, 512), True, RowScaledProduct),
        ("channel", Span(0, 8), Span(0, 512), True, NativeProduct),
        ("block", Span(128, 256), Span(0, 512), True, BlockScaledProduct),
        ("block", Span(128, 256), Span(0, 512), False, NativeProduct),
        ("block", Span(64, 192), Span(0, 512), True, NativeProduct),
        ("block", Span(0, 256), Span(64, 192), True, NativeProduct),
    ],
)
def test_tensor_cores_take_the_views_that_they_can_read(grain, rows, columns, hopper, kind, monkeypatch):
    monkeypatch.setattr(products, "_on_tensor_cores", is_aligned)
    monkeypatch.setattr(products, "_has_block_scaling", lambda device: hopper)
    block = fp8_block((BLOCK, BLOCK)), ScaledWeight("weight_scale_inv", "block", (BLOCK, BLOCK))
    quantise, scheme = {**ROW_SCALED, "block": block}[grain]
    tensors, _ = quantise(torch.randn(OUTPUTS, INPUTS))
    assert type(choose_product(scheme, piece_of(scheme, tensors, rows, columns))) is kind


def test_a_model_on_row_scaled_products_is_close_to_its_dense_weights(tmp_path, monkeypatch):
    """The whole engine as it runs on a GPU, with torch's CPU arithmetic; tokens in FP8 are all that differs."""
    monkeypatch.setattr(products, "_on_tensor_cores", lambda weight: True)  # mapped files are not aligned
    config = tiny_config("llama", intermediate_size=96, attention_bias=False, mlp_bias=False)
    model = make_quantised(config, tmp_path, FORMATS["compressed-channel"])
    prompt = make_prompts()[-1]
    expected = token_logprobs(model, torch.tensor([prompt]))
    with init_inference(str(tmp_path), **settings()) as engine:
        layers = [m for m in engine._rank.worker.model.module.modules() if isinstance(m, QuantizedLinear)]
        assert all(type(product) is RowScaledProduct for layer in layers for product, _ in layer._products)
        (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    entries = output.prompt_logprobs[1:]
    found = [entry[token].logprob for token, entry in zip(prompt[1:], entries, strict=True)]
    errors = (torch.tensor(found) - torch.tensor(expected)).abs()
    assert 0 < errors.mean() < 0.25, "a wrong scale or slice gives errors of several units"


def test_every_number_of_e4m3_is_widened_exactly():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()]
    assert len(numbers) == 254
    assert torch.equal(widened(numbers), numbers.float())
    strided = numbers.repeat(3, 1)[:, 5:9]
    assert torch.equal(widened(strided), strided.float())
