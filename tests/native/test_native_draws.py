"""Draws in C (native/sampling.c) are those of torch, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.model.sampling.draw import draw, draw_from, masses_of
from ulysses_infer.native.sampling import draws_natively
from ulysses_infer.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not draws_natively(torch.ones(1, 1)), reason="no C compiler")

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 4, 40, 200]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-9, 1)),
    min_p=st.sampled_from([0.0, 0.0, 1e-30, 0.05, 1.0]),
)
NUMBERS = st.one_of(st.just(0.0), st.just(1 - 2.0**-52), st.floats(0, 1 - 2.0**-52))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(PARAMS, NUMBERS), min_size=1, max_size=4),
    size=st.sampled_from([1, 2, 65, 300, 3000]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    kind=st.sampled_from(["plain", "ties", "forbidden"]),
    seed=st.integers(0, 1000),
)
def test_a_draw_in_c_is_that_of_torch(
    rows: list[tuple[SamplingParams, float]], size: int, spread: float, kind: str, seed: int
) -> None:
    logits = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(seed)) * spread
    if kind == "ties":
        logits = logits.round()
    elif kind == "forbidden":
        logits[:, 1::3] = -torch.inf
    params, numbers = [each for each, _ in rows], [number for _, number in rows]

    found = draw(logits, logits.amax(-1), params, numbers)

    assert found.tolist() == draw_from(masses_of(logits, logits.amax(-1), params), numbers).tolist()


def test_rows_that_are_not_finite_do_not_crash() -> None:
    logits = torch.tensor([[torch.nan, 1.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])

    assert draw(logits, logits.amax(-1), [SamplingParams(top_p=0.5, top_k=1)] * 3, [0.5] * 3).shape == (3,)
