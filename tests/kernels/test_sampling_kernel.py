"""Draws without sorting, in Triton's interpreter, equal those of torch and of the definition in Python's integers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.arithmetic import FRACTION
from ulysses_infer.kernels.launch import assume, counted
from ulysses_infer.model.sampling import transfer
from ulysses_infer.model.sampling.draw import draw, draw_from, masses_of
from ulysses_infer.model.sampling.head import concat_shards, pad_shard
from ulysses_infer.model.sampling.row import SamplingRow
from ulysses_infer.model.sampling.sampler import NO_TOKEN, Sampler
from ulysses_infer.parallel.groups import build_groups
from ulysses_infer.parallel.layout import Layout, Mode, even_span
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.worker.graphs.capture_checker import CaptureChecker

pytest.importorskip("triton")

from ulysses_infer.kernels import sampling

V = 75
ROWS, COLUMNS = 2, 32  # tiles of 64: a vocabulary of a whole tile and a part
LIMITS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": V + 9, "top_p": 0.7},
    {"top_p": 1e-9},
    {"top_p": 0.9},
    {"top_k": 9, "top_p": 0.6},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.01},
)


def random_logits(kind: str, rows: int, size: int = V, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":
        return (logits / 2).round()
    if kind == "equal":
        return torch.full_like(logits, -1.5)
    if kind == "forbidden":
        logits[:, ::3] = -torch.inf
        logits[:, -12:] = -torch.inf
    if kind == "far":  # weights that are denormal, or too small to count
        return logits * 20
    return logits


def by_kernel(
    logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float], rows: int = ROWS
) -> list[int]:
    size = logits.shape[1]
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    options = [(u, min(p.top_k or size, size), p.top_p, p.min_p) for p, u in zip(params, numbers, strict=True)]
    with assume("cpu", (9, 0)):
        tokens = sampling.draw(weights, torch.tensor(options, dtype=torch.float64), rows, COLUMNS)
    return tokens.tolist()


def by_torch(logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> list[int]:
    return draw_from(masses_of(logits, logits.amax(-1), params), numbers).tolist()


def in_c(logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> list[int]:
    return draw(logits, logits.amax(-1), params, numbers).tolist()


def by_definition(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """The token of one row: weights sorted, the lowest id first among equal ones, summed as whole numbers."""
    weights = (logits - logits.max()).exp().tolist()
    masses = [math.floor(weight * FRACTION) for weight in weights]
    lowest = torch.tensor(params.min_p).item()  # in float32, as weights are
    ranked = sorted((-weight, token) for token, weight in enumerate(weights) if weight >= lowest)
    ranked = ranked[: params.top_k or None]
    kept, before = set(), 0
    total = sum(masses[token] for _, token in ranked)
    for _, token in ranked:
        if params.top_p == 1 or before < params.top_p * total or not kept:
            kept.add(token)
        before += masses[token]
    target = int(number * sum(masses[token] for token in kept))
    reached = 0
    for token in sorted(kept):
        reached += masses[token]
        if reached > target:
            return token
    raise AssertionError("no token")


def check(logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> None:
    expected = [by_definition(*each) for each in zip(logits, params, numbers, strict=True)]
    assert by_torch(logits, params, numbers) == expected
    assert in_c(logits, params, numbers) == expected
    assert by_kernel(logits, params, numbers) == expected


@pytest.mark.parametrize(("kind", "limits"), [("ties", LIMITS), ("forbidden", LIMITS[-2:])])
def test_draws_equal_their_definition(kind: str, limits: Sequence[dict[str, Any]]) -> None:
    numbers = [0.7, 0.999, 0.0, 0.3, 0.5, 1 - 2.0**-52, 0.62, 0.999, 0.85][: len(limits)]
    check(random_logits(kind, len(limits)), [SamplingParams(**each) for each in limits], numbers)


@pytest.mark.parametrize(
    ("limits", "number", "token"),
    [
        ({"top_k": 10, "top_p": 0.5}, 0.999, 4),  # the nucleus of what top_k left
        ({"top_p": (30 * FRACTION + 0.5) / (V * FRACTION)}, 0.999, 30),  # the limit is just above 30 weights
        ({}, 64 / V, 64),  # the first of the second tile
        ({}, 1 - 2.0**-52, V - 1),
    ],
)
def test_draws_from_equal_weights(limits: dict[str, Any], number: float, token: int) -> None:
    logits, params = random_logits("equal", 1), [SamplingParams(**limits)]
    check(logits, params, [number])
    assert by_torch(logits, params, [number]) == in_c(logits, params, [number]) == [token]


@pytest.mark.thorough
@settings(max_examples=150)
@given(
    kind=st.sampled_from(["plain", "ties", "equal", "forbidden", "far"]),
    size=st.sampled_from([1, 2, 63, 64, 65, 130]),
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 140),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1)),
    min_p=st.sampled_from([0.0, 0.0, 1e-30, 0.05, 0.5, 1.0]),
    number=st.floats(0, 1 - 2.0**-52),
)
def test_any_draw_equals_its_definition(
    kind: str, size: int, seed: int, top_k: int, top_p: float, min_p: float, number: float
) -> None:
    logits = random_logits(kind, 1, size, seed)
    if not logits.isfinite().any():
        logits[0, 0] = 0.0
    check(logits, [SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)], [number])


@pytest.mark.thorough
def test_draws_follow_the_distribution() -> None:
    """Chi-square with 5 degrees of freedom: 25.7 is exceeded with a probability of 1e-4."""
    logits, count = torch.tensor([1.0, -1.0, 2.0, 0.0, 0.5, 2.0]), 600
    numbers = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    drawn = by_kernel(logits.expand(count, -1), [SamplingParams()] * count, numbers, rows=1)
    observed = torch.bincount(torch.tensor(drawn), minlength=6)
    expected = logits.softmax(-1) * count
    assert ((observed - expected) ** 2 / expected).sum() < 25.7


def make_rows(logits: torch.Tensor) -> list[SamplingRow]:
    """Rows of every kind for `logits`, whose fourth row is not finite."""
    params: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_p": 0.8, "temperature": 0.7},
        {"top_k": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"min_p": 0.1},
        {"logit_bias": {3: 2.0}, "top_k": 7, "top_p": 0.9},
        {"allowed_token_ids": [1, 5, 9], "min_tokens": 3},
    ]
    logits[3, 5] = torch.nan
    return [SamplingRow(SamplingParams(**p), seed, [1, 2, 2], [4], frozenset({9})) for seed, p in enumerate(params)]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the interpreter, of NaN
def test_the_sampler_gives_the_same_tokens_with_and_without_the_kernel() -> None:
    logits = random_logits("plain", 6)
    rows = make_rows(logits)
    expected = Sampler().sample(logits, rows)
    launches: Counter[str] = Counter()
    with assume("cpu", (9, 0)), counted(launches):
        assert Sampler().sample(logits, rows) == expected
    assert expected[3] == NO_TOKEN
    assert launches == {"draw_kernel": 2}  # whole rows, and the row that allows few tokens


def test_choosing_tokens_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither processors nor draws; what is copied to the device is pinned there, which needs a GPU."""
    monkeypatch.setattr(transfer, "_start_copy", lambda host, device: torch.empty_like(host, device=device))
    rows = make_rows(random_logits("plain", 6))
    with assume("meta", (9, 0)), CaptureChecker(torch.device("meta")):
        assert Sampler().choose(torch.empty(6, V, device="meta"), rows).shape == (6,)


def sample_shards(backend: str) -> list[list[int]] | None:
    """On a rank: tokens of the gathered shards, by torch and by the kernel; None except on rank 0."""
    layout = Layout(Mode(torch.distributed.get_world_size(), 1))
    groups = build_groups(layout, layout.modes, torch.device("cpu"), collectives=backend)
    logits = random_logits("ties", 6).bfloat16()
    span = even_span(V, groups.shard, layout.world_size)
    shards = groups.gather_to_first(pad_shard(logits[:, span.start : span.stop], V, layout.world_size))
    order = groups.shard_order
    groups.close()
    if shards is None:
        return None
    whole = concat_shards([shards[rank] for rank in order], V)
    rows = make_rows(whole)
    tokens = Sampler().sample(whole, rows)
    with assume("cpu", (9, 0)):
        return [tokens, Sampler().sample(whole, rows)]


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["shared_memory", "torch"])
def test_two_ranks_give_the_tokens_of_one(backend: str, rank_pool: Any) -> None:
    logits = random_logits("ties", 6).bfloat16().float()
    expected = Sampler().sample(logits, make_rows(logits))
    assert rank_pool(2).run(sample_shards, backend) == [[expected, expected], None]
