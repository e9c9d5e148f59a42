"""Learned sparse attention: scores all cached keys of an index for each token, and selects the slots of the best.

Scores are written to memory for as many tokens at a time as fit a bound, and read by a radix selection: four passes
find the score that the last selected key has, byte by byte, and a fifth writes the slots in order of position. Of keys
with this very score, the first are selected. So the result depends on the scores alone, not on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.attention import MIN_DOT, splits_of
from ulysses_infer.kernels.launch import launch

SCORE_BYTES = 1 << 28
"""Bound of the scores in memory, unless those of a single token take more."""
KEYS = 64
"""Keys per program and step."""
TILE = 2048
"""Scores that the selection reads at a time."""


@triton.jit
def sequence_of_row(row, cu_query_lens, num_sequences):
    """The sequence to which token `row` of the batch belongs; those without tokens are passed over."""
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_query_lens + middle) <= row:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_sequences", "first_row"])
def index_scores_kernel(
    query,
    weights,
    keys,
    block_tables,
    cu_query_lens,
    context_lens,
    scores,
    num_sequences,
    first_row,
    query_row,
    query_head,
    weight_row,
    key_block,
    key_slot,
    table_row,
    score_row,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per token and part of the keys. scores: [rows, longest], written up to the last key it sees."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + tl.program_id(0)
    sequence = sequence_of_row(row, cu_query_lens, num_sequences)
    end = (tl.load(context_lens + sequence) - (tl.load(cu_query_lens + sequence + 1) - row) + 1) // POOL
    head = tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    inside = (head < NUM_HEADS)[:, None] & (column < WIDTH)[None, :]
    q = tl.load(query + local * query_row + head[:, None] * query_head + column[None, :], mask=inside, other=0.0)
    weight = tl.load(weights + local * weight_row + head, mask=head < NUM_HEADS, other=0.0)
    table = block_tables + sequence.to(tl.int64) * table_row
    for at in range(tl.program_id(1) * KEYS, end, tl.num_programs(1) * KEYS):
        key = at + tl.arange(0, KEYS)
        position = key * POOL + POOL - 1
        number = tl.load(table + position // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
        places = keys + number * key_block + (position % BLOCK_SIZE) * key_slot
        seen = (key < end)[:, None] & (column < WIDTH)[None, :]
        k = tl.load(places[:, None] + column[None, :], mask=seen, other=0.0).to(q.dtype)
        product = tl.maximum(tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
        score = tl.sum(product * weight[:, None], axis=0)
        tl.store(scores + local * score_row + key, score, mask=key < end)


@triton.jit
def ordered_bits(score):
    """Unsigned integers in the order of `score`; both zeros are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["num_sequences", "first_row"])
def top_slots_kernel(
    scores,
    block_tables,
    cu_query_lens,
    context_lens,
    found,
    num_sequences,
    first_row,
    top_k,
    score_row,
    table_row,
    found_row,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    POOL: tl.constexpr,
):
    """One program per token. found: [rows, (top_k + 1) * POOL], slots in order of position, their number last."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + tl.program_id(0)
    sequence = sequence_of_row(row, cu_query_lens, num_sequences)
    seen = tl.load(context_lens + sequence) - (tl.load(cu_query_lens + sequence + 1) - row) + 1
    count = seen // POOL
    own = scores + local * score_row
    table = block_tables + sequence.to(tl.int64) * table_row
    out = found + local * found_row
    tl.store(out + top_k * POOL + POOL - 1, tl.minimum(count, top_k) * POOL + seen % POOL)
    number = tl.arange(0, TILE)
    last = tl.zeros([], tl.uint32)  # the score of the last selected key, as `ordered_bits`
    missing = top_k  # keys with this score that are selected
    if count > top_k:
        digits = tl.arange(0, 256)
        for turn in tl.static_range(4):
            shift = 24 - 8 * turn
            counts = tl.zeros([256], tl.int32)
            for at in range(0, count, TILE):
                bits = ordered_bits(tl.load(own + at + number, mask=at + number < count, other=0.0))
                counted = at + number < count
                if turn > 0:
                    counted = counted & ((bits >> (shift + 8)) == (last >> (shift + 8)))
                digit = tl.where(counted, (bits >> shift) & 255, 0).to(tl.int32)
                counts += tl.histogram(digit, 256) - tl.where(digits == 0, TILE - tl.sum(counted.to(tl.int32)), 0)
            above = tl.sum(counts) - tl.cumsum(counts, 0)  # with a greater digit
            chosen = tl.sum((above >= missing).to(tl.int32))
            missing -= tl.sum(tl.where(digits == chosen, above, 0))
            last = last | (chosen.to(tl.uint32) << shift)
    written = 0
    ties = 0
    for at in range(0, count, TILE):
        position = at + number
        inside = position < count
        bits = ordered_bits(tl.load(own + position, mask=inside, other=0.0))
        tied = inside & (bits == last)
        rank = ties + tl.cumsum(tied.to(tl.int32), 0)
        selected = (inside & (bits > last)) | (tied & (rank <= missing))
        place = written + tl.cumsum(selected.to(tl.int32), 0) - 1
        for member in tl.static_range(POOL):
            at_token = position * POOL + member
            block = tl.load(table + at_token // BLOCK_SIZE, mask=selected, other=0)
            tl.store(out + place * POOL + member, block * BLOCK_SIZE + at_token % BLOCK_SIZE, mask=selected)
        written += tl.sum(selected.to(tl.int32))
        ties += tl.sum(tied.to(tl.int32))
    for member in tl.static_range(POOL - 1):  # of the pool that is not complete
        at_token = count * POOL + member
        if at_token < seen:
            block = tl.load(table + at_token // BLOCK_SIZE)
            tl.store(out + written * POOL + member, block * BLOCK_SIZE + at_token % BLOCK_SIZE)


def top_slots(
    query: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    cu_query_lens: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    longest: int,
    top_k: int,
    first_row: int,
    pool: int = 1,
) -> torch.Tensor:
    """The slots of the best keys of some tokens of a step, of which `first_row` is the first, in order of position.

    query: [t, H, d]; weights: [t, H] float32; keys: [blocks, block size, 1, at least d]; longest: bound of the
    contexts; pool: tokens per key. Returns [t, (top_k + 1) * pool] int32, of which row i has n slots and n in the last
    column. A launch can be captured.
    """
    count = len(query)
    found = torch.empty(count, (top_k + 1) * pool, dtype=torch.int32, device=query.device)
    if not count:
        return found
    most = max(1, longest // pool)
    rows = min(count, max(1, SCORE_BYTES // (4 * most)))
    scores = torch.empty(rows, most, dtype=torch.float32, device=query.device)
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        sequences = block_tables, cu_query_lens, context_lens
        _score(query[part], weights[part], keys, sequences, scores, first_row + start, pool)
        launch(
            top_slots_kernel,
            (part.stop - start,),
            scores,
            *sequences,
            found[part],
            len(context_lens),
            first_row + start,
            top_k,
            scores.stride(0),
            block_tables.stride(0),
            found.stride(0),
            TILE=TILE,
            BLOCK_SIZE=keys.shape[1],
            POOL=pool,
            num_warps=8,
        )
    return found


def _score(
    query: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scores: torch.Tensor,
    first_row: int,
    pool: int,
) -> None:
    """Launch the scoring of the keys. sequences: block tables, sums of query lengths, context lengths."""
    count, heads, width = query.shape
    splits = splits_of(count, scores.shape[1], query.device)
    launch(
        index_scores_kernel,
        (count, splits),
        query,
        weights,
        keys,
        *sequences,
        scores,
        len(sequences[2]),
        first_row,
        *query.stride()[:2],
        weights.stride(0),
        *keys.stride()[:2],
        sequences[0].stride(0),
        scores.stride(0),
        NUM_HEADS=heads,
        HEADS=max(MIN_DOT, triton.next_power_of_2(heads)),
        WIDTH=width,
        COLUMNS=max(MIN_DOT, triton.next_power_of_2(width)),
        KEYS=KEYS if query.element_size() < 4 else MIN_DOT,
        BLOCK_SIZE=keys.shape[1],
        POOL=pool,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )
