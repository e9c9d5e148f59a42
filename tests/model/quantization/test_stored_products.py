"""On a GPU every format is multiplied in one launch, as it is stored: the same products, from every slice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.kernels.interpreter import use_exact_rounding
from tests.model.fake_step import FakeCollectives, step
from tests.model.quantization.test_component import GRAINS, loaded
from ulysses_infer.kernels.launch import assume, counted
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.parallel.sharding import Part, Sharding

LAYOUT, SHARD = Layout(Mode(2, 2)), 3


@pytest.mark.parametrize("cut", ["column", "row"])
@pytest.mark.parametrize(("quantise", "scheme"), GRAINS, ids=lambda value: type(value).__name__)
def test_products_equal_those_of_dense_weights(quantise: Any, scheme: Any, cut: str) -> None:
    use_exact_rounding()
    torch.manual_seed(0)
    tensors, dense = quantise(torch.randn(46, 62))
    bias = torch.randn(46) if cut == "column" else None
    sharding = Sharding((Part(dense.shape[cut == "row"]),))
    inputs = torch.randn(2, 3, 62)
    with assume("cpu", (8, 0)):
        for mode in LAYOUT.modes:
            place = LAYOUT.place(mode, SHARD)
            layer = loaded(scheme, tensors, dense.shape, cut, sharding, LAYOUT, SHARD, bias)
            layer.bind(place)
            (span,) = sharding.spans(place.weight_index, place.mode.tp)
            rows = slice(*span)
            launches: Counter[str] = Counter()
            with counted(launches), step(FakeCollectives()):
                if cut == "column":
                    found, expected = layer(inputs), inputs @ dense[rows].t() + bias[rows]
                else:
                    found, expected = layer.partial(inputs[..., rows]), inputs[..., rows] @ dense[:, rows].t()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert launches == {"experts_kernel": 1}
