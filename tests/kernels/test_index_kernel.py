"""Scoring and selection of an index in Triton's interpreter, against torch's path and scores written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import use_exact_rounding
from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences, running_sums
from ulysses_infer.attention.index import IndexQueries, selected, top_slots
from ulysses_infer.kernels import index
from ulysses_infer.kernels.launch import assume
from ulysses_infer.parallel.layout import Span

BLOCK = 4


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    use_exact_rounding()
    monkeypatch.setattr(index, "TILE", 16)  # so that short contexts have several
    monkeypatch.setattr(index, "splits_of", lambda *_: 2)


def step(lengths: tuple[int, ...], contexts: tuple[int, ...], for_kernels: bool = True) -> AttentionMetadata:
    """Sequences whose blocks are shuffled in the cache."""
    counts = [-(-context // BLOCK) for context in contexts]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3))
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int64)
    for row, blocks in enumerate(order.split(counts)):
        tables[row, : len(blocks)] = blocks
    query_lens, context_lens = np.array(lengths, np.int32), np.array(contexts, np.int32)
    kernel = KernelSequences(
        torch.from_numpy(running_sums(query_lens)),
        torch.from_numpy(running_sums(context_lens)),
        torch.from_numpy(context_lens),
        tables.int(),
        max(lengths),
        max(contexts),
        HostSequences(query_lens, context_lens, tables.numpy().astype(np.int32)),
    )
    slots = torch.zeros(sum(lengths), dtype=torch.int64)
    return AttentionMetadata(slots, list(lengths), list(contexts), tables, kernel if for_kernels else None)


def make(
    count: int, blocks: int, heads: int, width: int, top_k: int, dtype: torch.dtype, pool: int = 1
) -> tuple[IndexQueries, torch.Tensor]:
    """Small integers: their products are exact, so that scores are, and many are equal."""
    generator = torch.Generator().manual_seed(count)
    query, keys, weights = (
        torch.randint(-2, 3, shape, generator=generator)
        for shape in ((count, heads, width), (blocks, BLOCK, 1, width), (count, heads))
    )
    return IndexQueries(query.to(dtype), weights.float(), top_k, pool), keys.to(dtype)


def expected(queries: IndexQueries, keys: torch.Tensor, metadata: AttentionMetadata, rows: Span) -> list[list[int]]:
    """The slots of the best keys of each token, by sorting (-score, position); then those of no complete pool."""
    found, row, pool = [], 0, queries.pool
    for sequence, (length, context) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
        for end in range(context - length + 1, context + 1):
            if rows.start <= row < rows.stop:
                slots = [int(metadata.block_tables[sequence, at // BLOCK]) * BLOCK + at % BLOCK for at in range(end)]
                cached = keys.flatten(0, 2)[slots[pool - 1 :: pool]].double()
                own = row - rows.start
                products = (cached @ queries.query[own].double().t()).relu() @ queries.weights[own].double()
                best = sorted(range(end // pool), key=lambda at: (-float(products[at]), at))[: queries.top_k]
                pools = [range(at * pool, (at + 1) * pool) for at in sorted(best)] + [range(end // pool * pool, end)]
                found.append([slots[at] for tokens in pools for at in tokens])
            row += 1
    return found


BATCHES = {
    "decodes": ((1, 1, 1), (5, 61, 30)),
    "chunks and decodes": ((7, 1, 20), (33, 18, 20)),
    "empty sequence": ((3, 0, 5), (9, 1, 40)),
}


SIZES = {"float32": (4, 8, 8, torch.float32), "bfloat16": (16, 24, 13, torch.bfloat16)}


def cases() -> list[Any]:
    """Every batch in both dtypes, on the kernels and in torch. A batch of the kernels by default, and torch's."""
    product = itertools.product(BATCHES, SIZES, (True, False))
    return [
        pytest.param(
            batch,
            *SIZES[size],
            on_kernel,
            id=f"{batch}-{size}-{'triton' if on_kernel else 'torch'}",
            marks=[pytest.mark.thorough] if on_kernel and (batch, size) != ("chunks and decodes", "bfloat16") else [],
        )
        for batch, size, on_kernel in product
    ]


@pytest.mark.parametrize(("batch", "heads", "width", "top_k", "dtype", "on_kernel"), cases())
def test_the_best_keys_are_selected_the_first_of_equal_ones(
    batch: str, heads: int, width: int, top_k: int, dtype: torch.dtype, on_kernel: bool
) -> None:
    metadata = step(*BATCHES[batch], for_kernels=on_kernel)
    blocks = int(metadata.block_tables.max()) + 1
    count = sum(metadata.query_lens)
    queries, keys = make(count, blocks, heads, width, top_k, dtype)
    for rows in (Span(1, count - 1), Span(2, 2)):
        part = slice(rows.start, rows.stop)
        own = IndexQueries(queries.query[part], queries.weights[part], top_k)
        with assume("cpu", (9, 0)):
            found = top_slots(own, keys, metadata, rows)
        assert found.dtype == torch.int32
        assert found.shape == (rows.size, top_k + 1)
        assert [row[: row[-1]] for row in found.tolist()] == expected(own, keys, metadata, rows)


@pytest.mark.parametrize(
    ("batch", "pool", "on_kernel"),
    [
        ("chunks and decodes", 3, True),
        ("decodes", 4, False),
        ("chunks and decodes", 16, False),
        pytest.param("empty sequence", 4, True, marks=pytest.mark.thorough),
        pytest.param("decodes", 16, True, marks=pytest.mark.thorough),
    ],
)
def test_the_tokens_of_the_best_pools_are_selected_and_those_of_no_complete_pool(
    batch: str, pool: int, on_kernel: bool
) -> None:
    metadata = step(*BATCHES[batch], for_kernels=on_kernel)
    count, blocks = sum(metadata.query_lens), int(metadata.block_tables.max()) + 1
    queries, keys = make(count, blocks, 4, 8, 2, torch.float32, pool)
    with assume("cpu", (9, 0)):
        found = top_slots(queries, keys, metadata, Span(0, count))
    assert found.shape == (count, 3 * pool)
    wanted = expected(queries, keys, metadata, Span(0, count))
    assert [row[: row[-1]] for row in found.tolist()] == wanted
    assert selected(found, metadata, pool).context_lens == [len(row) for row in wanted]


@pytest.mark.thorough
def test_scores_of_many_tokens_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = step((9, 5), (30, 41))
    queries, keys = make(14, int(metadata.block_tables.max()) + 1, 4, 8, 6, torch.float32)
    with assume("cpu", (9, 0)):
        whole = top_slots(queries, keys, metadata, Span(0, 14))
        monkeypatch.setattr(index, "SCORE_BYTES", 4 * 41 * 4)  # four tokens at a time
        parts = top_slots(queries, keys, metadata, Span(0, 14))
    assert [row[: row[-1]] for row in parts.tolist()] == [row[: row[-1]] for row in whole.tolist()]


@pytest.mark.parametrize("special", [0.0, 3e38, pytest.param(1e-38, marks=pytest.mark.thorough)])
def test_scores_of_any_size_are_ordered(special: float) -> None:
    """Queries of one number: each score is the product with the weight. A negative weight gives zeros of both signs."""
    context = 40
    metadata = step((1,), (context,))
    generator = torch.Generator().manual_seed(1)
    keys = torch.rand(context // BLOCK, BLOCK, 1, 1, generator=generator)
    keys.view(-1)[::3] = special
    for weight in (1.0, -1.0):
        queries = IndexQueries(torch.ones(1, 1, 1), torch.full((1, 1), weight), 11)
        with assume("cpu", (9, 0)):
            found = top_slots(queries, keys, metadata, Span(0, 1))[0].tolist()
        assert found[:11] == expected(queries, keys, metadata, Span(0, 1))[0]


def test_selected_keys_are_sequences_of_one_token_in_blocks_of_one_slot() -> None:
    metadata = step((3, 2), (5, 30))
    queries, keys = make(5, int(metadata.block_tables.max()) + 1, 4, 8, 4, torch.float32)
    with assume("cpu", (9, 0)):
        found = top_slots(queries, keys, metadata, Span(0, 5))
        made = selected(found, metadata)
    assert made.context_lens == [3, 4, 4, 4, 4]
    assert made.kernel is not None
    assert made.kernel.context_lens.tolist() == made.context_lens
    assert made.kernel.cu_query_lens.tolist() == list(range(6))
    assert made.kernel.decodes_only
    on_host = selected(found, step((3, 2), (5, 30), for_kernels=False))
    assert on_host.context_lens == made.context_lens
    rows = zip(on_host.block_tables.tolist(), made.kernel.block_tables.tolist(), made.context_lens, strict=True)
    assert all(ours[:count] == theirs[:count] for ours, theirs, count in rows)
