"""The pools that a step completes: of listed sequences, and of what a captured step finds on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.attention.backend import AttentionMetadata
from ulysses_infer.model.layers.pooled_keys import Pools, pools_of

pytest.importorskip("triton")

from tests.kernels.test_index_kernel import BLOCK, step

Sequences = list[tuple[int, int]]
SEQUENCES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 30)).map(lambda pair: (pair[0], sum(pair))), min_size=1, max_size=5
)


def make(sequences: Sequences) -> AttentionMetadata:
    """sequences: tokens in the step and in all. The slots are those of the block tables."""
    lengths, contexts = zip(*sequences, strict=True)
    metadata = step(lengths, contexts)
    slots = [slot_of(metadata, n, at) for n, (count, end) in enumerate(sequences) for at in range(end - count, end)]
    return replace(metadata, slots=torch.tensor(slots))


def slot_of(metadata: AttentionMetadata, sequence: int, position: int) -> int:
    return int(metadata.block_tables[sequence, position // BLOCK]) * BLOCK + position % BLOCK


def expected(metadata: AttentionMetadata, sequences: Sequences, pool: int) -> list[tuple[int, list[int]]]:
    """The first position of every pool, and the slots of its tokens."""
    found = []
    for sequence, (count, end) in enumerate(sequences):
        for last in range(end - count, end):
            if last % pool == pool - 1:
                members = range(last - pool + 1, last + 1)
                found.append((members[0], [slot_of(metadata, sequence, at) for at in members]))
    return found


def complete(pools: Pools) -> list[tuple[int, list[int]]]:
    rows = list(zip(pools.starts.tolist(), pools.slots.tolist(), strict=True))
    return (
        rows
        if pools.is_complete is None
        else [row for row, is_one in zip(rows, pools.is_complete, strict=True) if is_one]
    )


@given(SEQUENCES, st.sampled_from([1, 2, 3, 4, 6, 16]))
def test_pools_end_at_tokens_of_the_step(sequences: Sequences, pool: int) -> None:
    metadata = make(sequences)
    wanted = expected(metadata, sequences, pool)
    assert complete(pools_of(metadata, pool, BLOCK)) == wanted
    captured = replace(metadata, query_lens=[], context_lens=[])
    pools = pools_of(captured, pool, BLOCK)
    assert complete(pools) == wanted
    assert pools.slots[:, -1].tolist() == metadata.slots.tolist(), "every token writes to its own slot"
