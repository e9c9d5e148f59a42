"""Steps in numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.test_policy import batch_of
from ulysses_infer.step_time.step_shape import BREAKPOINTS, FEATURES, StepShape

CONTEXTS = st.lists(st.integers(1, 9000), max_size=40)
CHUNKS = st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 9000)), max_size=8)


def test_a_mixed_step_counts_its_parts():
    shape = StepShape.of([10, 20], [(100, 4), (0, 3)])
    assert shape == StepShape(
        num_prefill_tokens=7,
        num_decodes=2,
        num_prefills=2,
        decode_context=30,
        prefill_context=107,
        fresh_pairs=10 + 6,
        past_pairs=400,
    )
    assert (shape.num_tokens, shape.num_sequences) == (9, 4)


@given(CONTEXTS, CHUNKS)
def test_features_are_never_negative_and_segments_add_up_to_the_tokens(contexts, chunks):
    shape = StepShape.of(contexts, chunks)
    features = dict(zip(FEATURES, shape.features(), strict=True))
    assert min(features.values()) >= 0
    segments = [features[f"tokens_from_{knot}"] for knot in BREAKPOINTS]
    assert sum(segments) == max(0, shape.num_tokens - BREAKPOINTS[0])
    assert features["constant"] == 1


@given(CONTEXTS, CHUNKS, st.integers(1, 9000))
def test_one_more_sequence_lowers_no_feature(contexts, chunks, more):
    before = StepShape.of(contexts, chunks).features()
    assert np.all(StepShape.of([*contexts, more], chunks).features() >= before)
    assert np.all(StepShape.of(contexts, [*chunks, (0, more)]).features() >= before)


def test_a_batch_tells_decodes_from_chunks():
    batch = batch_of(5, 1)  # a prompt of three tokens, from its first one on
    assert batch.shape == StepShape.of([], [(0, 5), (0, 1)])


def test_steps_of_one_kind_have_tokens_and_context_of_one_size():
    assert StepShape.of([100] * 13, []).bucket == StepShape.of([120] * 16, []).bucket
    assert StepShape.of([100] * 16, []).bucket != StepShape.of([100] * 17, []).bucket
    assert StepShape.of([], [(0, 65)]).bucket == StepShape.of([], [(0, 127)]).bucket
    assert StepShape.of([100] * 9, []).bucket != StepShape.of([900] * 9, []).bucket
    assert StepShape.of([100], []).bucket != StepShape.of([], [(99, 1)]).bucket
