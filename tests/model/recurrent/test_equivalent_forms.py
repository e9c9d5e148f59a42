"""What counts as the same inner part of a recurrent layer."""

from __future__ import annotations

import pytest
import torch

from tests.native.recurrent_layers import SHAPES, make_layer
from ulysses_infer.model.fusion.recurrent import is_equivalent_form
from ulysses_infer.model.recurrent.layer import RecurrentLayer


def with_states_times(layer: RecurrentLayer, factor: float):
    """The layer's own inner part, except that the states it leaves are multiplied by `factor`."""

    def form(states, index, run, inputs):
        result = layer.run_inner(states, run, inputs)
        for shape in states.shapes:
            states.state(shape.layer, shape.kind, shape.index).mul_(factor)
        return result

    return form


@pytest.mark.parametrize(
    ("dtype", "factor", "is_same"),
    [
        (torch.bfloat16, 1.0, True),
        (torch.bfloat16, 1 + 1e-4, True),  # what one input that is rounded the other way changes
        (torch.bfloat16, 1.01, False),
        (torch.float32, 1.0, True),
        (torch.float32, 1 + 1e-4, False),
    ],
)
def test_states_may_differ_by_the_rounding_of_the_layers_dtype(dtype, factor, is_same):
    layer = make_layer("bamba", dtype, SHAPES["bamba"])
    assert is_equivalent_form(layer, with_states_times(layer, factor), dtype) == is_same
