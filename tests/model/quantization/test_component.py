"""Slicing: for any blocks and cuts, a slice of the stored tensors is that slice of the whole weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.fake_step import FakeCollectives, step
from tests.model.quantization.checkpoints import (
    FORMATS,
    Format,
    awq,
    compressed,
    float_zeros,
    fp8_block,
    gptq,
    int8_channel,
)
from ulysses_infer.model.loading.files import MemorySource
from ulysses_infer.model.quantization.component import covering, spread
from ulysses_infer.model.quantization.float_zeros import FloatZeroWeight
from ulysses_infer.model.quantization.formats import read_quantization
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.packed import AwqWeight, CompressedWeight, GptqWeight
from ulysses_infer.model.quantization.products import Piece
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.parallel.layout import Layout, Mode, Span
from ulysses_infer.parallel.sharding import Part, Sharding

LAYOUTS = [Layout(Mode(*base)) for base in ((1, 1), (4, 1), (2, 2), (1, 4), (4, 2))]
BLOCKS = st.tuples(st.integers(1, 40), st.integers(1, 40))
COLUMNS = {
    "neurons": Sharding((Part(41),)),
    "heads": Sharding((Part(8, 3),)),
    "key/value heads": Sharding((Part(2, 5, shared=True),)),
    "packed q, k, v": Sharding((Part(8, 2), Part(2, 3, shared=True), Part(2, 3, shared=True))),
    "packed gate and up": Sharding((Part(19), Part(19))),
}
GRAINS = [
    (awq(12), AwqWeight(12)),
    (gptq(12), GptqWeight(12)),
    (gptq(20, reordered=True), GptqWeight(20, 4, True)),
    (compressed(12, symmetric=False), CompressedWeight(12, 4, False)),
    (float_zeros(12), FloatZeroWeight(12)),
    (float_zeros(32), FloatZeroWeight(32)),
    (int8_channel, ScaledWeight("weight_scale", "channel", dtype=torch.int8)),
    (fp8_block((7, 9)), ScaledWeight("weight_scale_inv", "block", (7, 9))),
]


def loaded(scheme, tensors, shape, cut, sharding, layout, shard, bias=None):
    """The layer of one rank, filled from the tensors of the whole."""
    source = torch.nn.Linear(shape[1], shape[0], bias=bias is not None)
    layer = QuantizedLinear(source, scheme, cut, sharding, layout.place(layout.base, shard))
    whole = MemorySource({**tensors, **({} if bias is None else {"bias": bias})})
    for name, _ in list(layer.named_parameters()):
        read = layer.read(name, whole, name).to(layer.get_parameter(name).dtype)
        setattr(layer, name, torch.nn.Parameter(read, requires_grad=False))
    return layer


def every_place(layout):
    return [layout.place(mode, shard) for mode in layout.modes for shard in range(layout.world_size)]


@given(st.integers(1, 50), st.integers(0, 300), st.integers(0, 300))
def test_spread_indices_are_those_of_the_features(step, first, second):
    span = Span(min(first, second), max(first, second))
    indices = covering(span, step)
    values = torch.arange(indices.start, indices.stop)
    assert spread(values, 0, span, step).tolist() == [feature // step for feature in range(*span)]
    assert (indices.stop - 1) * step < max(span.stop, 1), "no index more than is needed"


@settings(deadline=None, max_examples=40)
@given(BLOCKS, st.sampled_from(LAYOUTS), st.sampled_from(sorted(COLUMNS)))
def test_column_slices_of_weight_and_scales_are_slices_of_the_whole(block, layout, kind):
    sharding = COLUMNS[kind]
    tensors, dense = fp8_block(block)(torch.randn(sharding.features, 33))
    scheme = ScaledWeight("weight_scale_inv", "block", block)
    for place in every_place(layout):
        layer = loaded(scheme, tensors, dense.shape, "column", sharding, layout, place.shard)
        layer.bind(place)
        wanted = torch.cat([dense[slice(*span)] for span in sharding.spans(place.weight_index, place.mode.tp)])
        torch.testing.assert_close(layer(torch.eye(33)).t(), wanted)


@settings(deadline=None, max_examples=40)
@given(BLOCKS, st.sampled_from(LAYOUTS), st.integers(8, 60))
def test_row_slices_of_weight_and_scales_are_slices_of_the_whole(block, layout, width):
    sharding = Sharding((Part(width),))
    tensors, dense = fp8_block(block)(torch.randn(21, width))
    scheme = ScaledWeight("weight_scale_inv", "block", block)
    for place in every_place(layout):
        layer = loaded(scheme, tensors, dense.shape, "row", sharding, layout, place.shard)
        layer.bind(place)
        (span,) = sharding.spans(place.weight_index, place.mode.tp)
        torch.testing.assert_close(product(layer, span.size).t(), dense[:, slice(*span)])


def product(layer, width):
    """A row layer's partial result for the unit vectors of its inputs: its slice of the weight, transposed."""
    collectives = FakeCollectives()
    with step(collectives):
        layer(torch.eye(width))
    (partial,) = collectives.partials
    return partial


@pytest.mark.parametrize("cut", ["column", "row"])
@pytest.mark.parametrize(("quantise", "scheme"), GRAINS, ids=lambda value: type(value).__name__)
def test_slices_of_packed_words_and_groups_are_slices_of_the_whole(quantise, scheme, cut):
    tensors, dense = quantise(torch.randn(46, 62))
    sharding = Sharding((Part(dense.shape[cut == "row"]),))
    for layout in LAYOUTS:
        for place in every_place(layout):
            layer = loaded(scheme, tensors, dense.shape, cut, sharding, layout, place.shard)
            layer.bind(place)
            (span,) = sharding.spans(place.weight_index, place.mode.tp)
            if cut == "column":
                torch.testing.assert_close(layer(torch.eye(62)).t(), dense[slice(*span)])
            else:
                torch.testing.assert_close(product(layer, span.size).t(), dense[:, slice(*span)])


@pytest.mark.parametrize("cut", ["column", "row"])
def test_biases_are_cut_with_the_outputs_or_added_once(cut):
    tensors, dense = fp8_block((7, 9))(torch.randn(24, 26))
    bias, inputs = torch.randn(24), torch.randn(3, 26)
    scheme, layout = ScaledWeight("weight_scale_inv", "block", (7, 9)), Layout(Mode(4, 1))
    sharding = Sharding((Part(dense.shape[cut == "row"]),))
    place = layout.place(Mode(1, 4), 2)
    layer = loaded(scheme, tensors, dense.shape, cut, sharding, layout, 2, bias)
    layer.bind(place)
    whole = inputs @ dense.t()
    if cut == "column":
        torch.testing.assert_close(layer(inputs), (whole + bias)[:, 12:18])
    else:
        with step(FakeCollectives(whole)):
            torch.testing.assert_close(layer(inputs[:, 13:19]), whole + bias)


@pytest.mark.parametrize("cut", ["column", "row"])
@pytest.mark.parametrize("name", ["fp8-block", "compressed-channel", "gptq", "awq", "compressed-int4-zeros"])
def test_every_mode_reads_views_of_what_is_stored_once(name, cut):
    chosen: Format = FORMATS[name]

    class Config:
        quantization_config = chosen.config

    scheme = read_quantization(Config, list).scheme_of("model.layers.0.mlp.up_proj")
    tensors, dense = chosen.quantise(torch.randn(96, 96))
    layout, sharding = Layout(Mode(4, 2)), Sharding((Part(96),))
    layer = loaded(scheme, tensors, dense.shape, cut, sharding, layout, 5)
    for mode in layout.modes:
        layer.bind(layout.place(mode, 5))
        for _, piece in layer._products:
            for part, view in piece.parts.items():
                stored = layer.get_parameter(part)
                assert view.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 400), st.integers(1, 70), BLOCKS)
def test_tiles_cover_the_rows_once_and_carry_their_scales(start, size, tile, block):
    rows, columns = Span(start, start + size), Span(0, 30)
    scheme = ScaledWeight("weight_scale_inv", "block", block)
    tensors, dense = fp8_block(block)(torch.randn(rows.stop, 30))
    components = scheme.components(rows.stop, 30)
    parts = {name: components[name].view(t, "column", [Span(0, rows.stop)], rows) for name, t in tensors.items()}
    tiles = list(Piece(rows, columns, components, parts, None).tiles(tile))
    assert all(span.size <= tile for span, _ in tiles)
    found = torch.cat([scheme.dequantise(own, span, columns) for span, own in tiles])
    torch.testing.assert_close(found, dense[slice(*rows)])
