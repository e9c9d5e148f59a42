"""`ShiftLinear`: the slices of any mode add up to the full layer, and none is a copy."""

import pytest
import torch
from torch import nn

from tests.model.fake_step import FakeCollectives, step
from ulysses_infer.model.layers.linear import ShiftLinear
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.parallel.sharding import Part, Sharding

LAYOUTS = [
    Layout(Mode(sp, tp), order)
    for sp, tp in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 4), (4, 2))
    for order in ("sp_inner", "tp_inner")
]
COLUMNS = {
    "neurons": Sharding((Part(21),)),
    "heads": Sharding((Part(8, 3),)),
    "key/value heads": Sharding((Part(2, 5, shared=True),)),
    "packed q, k, v": Sharding((Part(8, 2), Part(2, 2, shared=True), Part(2, 2, shared=True))),
    "packed gate and up": Sharding((Part(11), Part(11))),
}


def stored(source, cut, sharding, layout, shard):
    """The layer of one rank with its slice of `source` filled in, as the loader does it."""
    layer = ShiftLinear(source, cut, sharding, layout.place(layout.base, shard))
    for name, parameter in source.named_parameters():
        kept = layer.slices(name)
        whole = parameter.detach()
        part = whole if kept is None else torch.cat([whole.narrow(kept[0], s.start, s.size) for s in kept[1]], kept[0])
        getattr(layer, name).data.copy_(part)
    return layer


def cases():
    return [(layout, mode) for layout in LAYOUTS for mode in layout.modes]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_column_slices_are_the_features_of_the_whole_layer(kind, bias):
    sharding = COLUMNS[kind]
    source = nn.Linear(6, sharding.features, bias=bias)
    inputs = torch.randn(5, 6)
    whole = source(inputs)
    for layout, mode in cases():
        for shard in range(layout.world_size):
            place = layout.place(mode, shard)
            layer = stored(source, "column", sharding, layout, shard)
            layer.bind(place)
            wanted = [whole[:, slice(*span)] for span in sharding.spans(place.weight_index, mode.tp)]
            torch.testing.assert_close(layer(inputs), torch.cat(wanted, dim=1))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("width", [8, 21])
def test_row_slices_sum_to_the_whole_layer_with_the_bias_once(width, bias):
    sharding = Sharding((Part(width),))
    source = nn.Linear(width, 6, bias=bias)
    inputs = torch.randn(5, width)
    whole = source(inputs)
    for layout, mode in cases():
        group = [layout.shard_of(rank) for rank in layout.tp_group(mode, 0)]
        layers = [stored(source, "row", sharding, layout, shard) for shard in group]
        slices = []
        for shard, layer in zip(group, layers, strict=True):
            place = layout.place(mode, shard)
            layer.bind(place)
            (span,) = sharding.spans(place.weight_index, mode.tp)
            slices.append(inputs[:, slice(*span)])
        first = FakeCollectives()
        with step(first):
            for layer, part in zip(layers, slices, strict=True):
                layer(part)
        for layer, part, summed in zip(layers, slices, first.partials, strict=True):
            assert torch.equal(layer.partial(part), summed)
            assert layer.has_partial == (not bias)
        total = torch.stack(first.partials).sum(0)
        with step(FakeCollectives(total)):
            for layer, part in zip(layers, slices, strict=True):
                torch.testing.assert_close(layer(part), whole)


@pytest.mark.parametrize("cut", ["column", "row"])
def test_every_mode_reads_views_of_the_one_stored_weight(cut):
    sharding = COLUMNS["packed q, k, v"] if cut == "column" else Sharding((Part(8, 3),))
    source = nn.Linear(6, sharding.features) if cut == "column" else nn.Linear(sharding.features, 6)
    layout = Layout(Mode(4, 2))
    layer = stored(source, cut, sharding, layout, shard=5)
    weight = layer.weight
    inside = range(weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size())
    for mode in layout.modes:
        layer.bind(layout.place(mode, 5))
        for view, bias in layer._pieces:
            assert view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
            assert view.data_ptr() in inside
            assert bias is None or bias.untyped_storage().data_ptr() == layer.bias.untyped_storage().data_ptr()


def test_only_the_base_slice_is_stored():
    source = nn.Linear(16, 24)
    layer = ShiftLinear(source, "column", Sharding((Part(24),)), Layout(Mode(2, 4)).place(Mode(2, 4), 3))
    assert layer.weight.shape == (6, 16)
    assert layer.bias.shape == (6,)
    layer = ShiftLinear(source, "row", Sharding((Part(16),)), Layout(Mode(2, 4)).place(Mode(2, 4), 3))
    assert layer.weight.shape == (24, 4)
    assert layer.bias.shape == (24,)
