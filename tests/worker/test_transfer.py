"""A step's inputs arrive as they were sent, whatever was sent before."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.worker.transfer import DirectInputs, PackedInputs, make_inputs

CPU = torch.device("cpu")
arrays = st.tuples(
    st.sampled_from([np.int64, np.int32, np.uint8]), st.lists(st.integers(0, 7), min_size=1, max_size=2)
).map(lambda drawn: np.random.default_rng(0).integers(0, 99, size=drawn[1]).astype(drawn[0]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(arrays, max_size=5), min_size=1, max_size=6))
def test_packed_inputs_arrive_as_they_were(steps):
    inputs = PackedInputs(CPU)
    for sent in steps:
        arrived = inputs.send(sent)
        assert [(tuple(t.shape), t.numpy().dtype, t.tolist()) for t in arrived] == [
            (array.shape, array.dtype, array.tolist()) for array in sent
        ]


def test_a_step_may_be_packed_while_the_one_before_is_read():
    inputs = PackedInputs(CPU)
    (first,) = inputs.send([np.arange(4)])
    (second,) = inputs.send([np.arange(4) + 10])
    assert (first.tolist(), second.tolist()) == ([0, 1, 2, 3], [10, 11, 12, 13])


def test_a_packed_step_is_one_piece_of_memory():
    fields = PackedInputs(CPU).send([np.zeros(3, np.int64), np.zeros((2, 5), np.int32), np.zeros(1, np.int32)])
    assert len({field.untyped_storage().data_ptr() for field in fields}) == 1
    assert all(field.data_ptr() % 16 == 0 for field in fields)


@pytest.mark.parametrize("inputs", [DirectInputs(), PackedInputs(CPU)])
def test_arrays_that_are_not_dense_arrive_dense(inputs):
    (field,) = inputs.send([np.arange(12).reshape(3, 4)[:, ::2]])
    assert field.is_contiguous()
    assert field.tolist() == [[0, 2], [4, 6], [8, 10]]


def test_on_a_cpu_nothing_is_copied():
    array = np.arange(5)
    (field,) = make_inputs(CPU).send([array])
    assert field.data_ptr() == array.ctypes.data
