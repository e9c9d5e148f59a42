"""Naive attention in float64, and random sequences in a paged cache to compare a backend with it."""

import torch

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions


def naive(query, keys, values, options):
    """One sequence. query: [n, Hq, d], the last n positions; keys: [m, Hkv, d]; values: [m, Hkv, dv]."""
    length, heads, _ = query.shape
    context, groups = keys.shape[0], heads // keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = torch.einsum("nhd,mhd->hnm", query.double(), keys) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    positions = range(context)
    seen = [[sees(position, other, options) for other in positions] for position in positions[context - length :]]
    if options.alibi is not None:
        places = torch.arange(context, dtype=torch.float64)
        scores = scores - options.alibi.double()[:, None, None] * (places[context - length :, None] - places)
    if options.relative is not None:
        extent = options.relative.shape[-1]
        for row, column in ((row, column) for row in range(length) for column in positions):
            distance = context - length + row - column
            if 0 <= distance < extent:
                scores[:, row, column] += options.relative[row, :, distance].double()
    scores = scores.masked_fill(~torch.tensor(seen), float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.double().expand(length, heads).t()[:, :, None]
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., :context]
    return torch.einsum("hnm,mhv->nhv", weights, values)


def expected(sequences, options):
    """The outputs of `naive` for all sequences of a step, [T, Hq, dv]."""
    outputs, start = [], 0
    for query, keys, values in sequences:
        outputs.append(naive(query, keys, values, options.of_rows(slice(start, start + len(query)))))
        start += len(query)
    return torch.cat(outputs)


def sees(position, other, options):
    inside = options.sliding_window is None or position - other < options.sliding_window
    same = options.chunk_size is None or position // options.chunk_size == other // options.chunk_size
    return other <= position and inside and same


def paged(contexts, block_size, num_blocks, generator):
    """Block tables over shuffled blocks, padded with 0; no two sequences share a block."""
    free = torch.randperm(num_blocks, generator=generator).tolist()
    needed = [-(-context // block_size) for context in contexts]
    tables = torch.zeros(len(contexts), max(needed), dtype=torch.int64)
    for row, count in enumerate(needed):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    return tables


def random_step(lengths, contexts, heads, width, value_width, block_size, seed, dtype):
    """(query, cached keys, cached values, metadata, each sequence's query, keys and values); unused cache is NaN."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, key_value_heads = heads
    num_blocks = sum(-(-context // block_size) for context in contexts) + 3
    keys = torch.full((num_blocks, block_size, key_value_heads, width), float("nan"), dtype=dtype)
    values = torch.full((num_blocks, block_size, key_value_heads, value_width), float("nan"), dtype=dtype)
    tables = paged(contexts, block_size, num_blocks, generator)
    sequences, slots = [], []
    for table, length, context in zip(tables, lengths, contexts, strict=True):
        key = torch.randn(context, key_value_heads, width, generator=generator).to(dtype)
        value = torch.randn(context, key_value_heads, value_width, generator=generator).to(dtype)
        where = [int(table[p // block_size]) * block_size + p % block_size for p in range(context)]
        keys.flatten(0, 1)[where], values.flatten(0, 1)[where] = key, value
        sequences.append((torch.randn(length, query_heads, width, generator=generator).to(dtype), key, value))
        slots += where[context - length :]
    metadata = AttentionMetadata(torch.tensor(slots), list(lengths), list(contexts), tables)
    return torch.cat([query for query, _, _ in sequences]), keys, values, metadata, sequences


def unseen_blocks(metadata, options, block_size):
    """(sequence, block of its table) of every block that none of the step's queries sees."""
    for sequence, (length, context) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
        for block in range(options.span.first_visible(context - length) // block_size):
            yield sequence, block


def spoil_unseen(keys, values, metadata, options):
    """Fill the blocks freed behind a window with NaN: a weight of 0 does not hide it."""
    for place in unseen_blocks(metadata, options, keys.shape[1]):
        keys[metadata.block_tables[place]] = values[metadata.block_tables[place]] = float("nan")


def check(
    backend, lengths, contexts, heads, options, width=8, value_width=8, block_size=4, seed=0, dtype=torch.float32
):
    """Run the backend on random sequences and compare each with `naive`."""
    step = random_step(lengths, contexts, heads, width, value_width, block_size, seed, dtype)
    query, keys, values, metadata, sequences = step
    spoil_unseen(keys, values, metadata, options)
    output = backend.attend(query, keys, values, metadata, options)
    assert output.shape == (sum(lengths), heads[0], value_width)
    assert output.dtype == dtype
    wanted = expected(sequences, options)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(output.double(), wanted, atol=tolerance, rtol=tolerance)


MOST_TOKENS = 256  # of a step

OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "chunks": {"chunk_size": 6},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "window and sinks": {"sliding_window": 5, "sinks": True},
    "window and soft cap": {"sliding_window": 7, "softcap": 1.5},
    "alibi": {"alibi": True},
    "window and alibi": {"sliding_window": 7, "alibi": True},
    "relative": {"relative": 5},
    "relative and sinks per token": {"sliding_window": 9, "relative": 9, "sinks": True},
    "all": {"sliding_window": 9, "chunk_size": 12, "softcap": 2.0, "sinks": True, "alibi": True},
}


def make_options(name, query_heads, scaling=0.3):
    chosen = dict(OPTIONS[name])
    if chosen.pop("sinks", False):
        chosen["sinks"] = torch.linspace(-2.0, 2.0, query_heads)
    if chosen.pop("alibi", False):
        chosen["alibi"] = torch.linspace(0.5, 0.01, query_heads)
    if extent := chosen.pop("relative", None):
        generator = torch.Generator().manual_seed(extent)
        chosen["relative"] = torch.randn(MOST_TOKENS, query_heads, extent, generator=generator)
        if "sinks" in chosen:
            chosen["sinks"] = torch.randn(MOST_TOKENS, query_heads, generator=generator)
    return AttentionOptions(scaling=scaling, **chosen)


BATCHES = {
    "decode": ([1], [17]),
    "first token": ([1], [1]),
    "whole prompt": ([19], [19]),
    "later chunk": ([6], [19]),
    "decodes": ([1, 1, 1], [3, 16, 25]),
    "mixed": ([1, 7, 1, 5, 12], [9, 7, 33, 21, 12]),
}
