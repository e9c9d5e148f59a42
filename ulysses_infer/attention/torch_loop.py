"""Attention backend in plain torch: one fused attention call per sequence, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
from torch.nn import functional as F

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions

SCORES_PER_CALL = 1 << 24  # bounds explicit scores (soft cap, ALiBi, sinks, relative) to 64 MiB of float32
MASK_PER_CALL = 1 << 26  # bounds a mask, which torch makes float32, to 256 MiB; tiles of few rows would be slow


class TorchLoopAttention:
    """Gathers the blocks of a sequence, then attends. Decodes fold the query heads of a query group into rows."""

    name = "torch"

    def __init__(self) -> None:
        # Reused, because allocation costs as much as the gather itself. By name and shape of a block.
        self._buffers: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        output = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
        self.attend_sequences(range(len(metadata.query_lens)), query, keys, values, metadata, options, output)
        return output

    def attend_sequences(
        self,
        sequences: Iterable[int],
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        output: torch.Tensor,
    ) -> None:
        """Attend for some sequences of the batch, writing their rows of `output`."""
        ends, span = list(accumulate(metadata.query_lens)), options.span
        for index in sequences:
            length, context = metadata.query_lens[index], metadata.context_lens[index]
            first = span.first_visible(context - length)
            start = first // keys.shape[1]
            blocks = metadata.block_tables[index, start : ceil_div(context, keys.shape[1])]
            first = start * keys.shape[1]
            key = self._gather("keys", keys, blocks)[: context - first]
            value = self._gather("values", values, blocks)[: context - first]
            key, value = key.to(query.dtype), value.to(query.dtype)  # a cache of another dtype
            rows = slice(ends[index] - length, ends[index])
            output[rows] = _attend_one(query[rows], key, value, first, options.of_rows(rows))

    def _gather(self, name: str, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """[m, Hkv, d], the tokens of `blocks` in order. Valid until the next call with this `name`."""
        key, count = (name, cache.shape[1:]), blocks.shape[0]
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape[0] < count or buffer.dtype != cache.dtype:
            buffer = self._buffers[key] = cache.new_empty(count, *cache.shape[1:])
        return torch.index_select(cache, 0, blocks, out=buffer[:count]).flatten(0, 1)


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int, options: AttentionOptions
) -> torch.Tensor:
    """Attend for one sequence. query: [n, Hq, d], the last n positions; key, value: [m, Hkv, d] from `first` on."""
    length, count = query.shape[0], key.shape[0]
    context = first + count
    plain = options.softcap is None and not options.is_per_head
    sees_all = options.span.first_visible(context - 1) <= first
    if plain and length == 1 and sees_all:
        return _decode(query, key, value, options.scaling)
    if plain and length == count and sees_all:
        return _fused(query, key, value, None, options)
    if plain and sees_all and 2 * length <= count and query.device.type == "cpu" and key.shape == value.shape:
        return _chunk(query, key, value, options.scaling)
    attend = _fused if plain else _explicit
    size = MASK_PER_CALL // count if plain else SCORES_PER_CALL // (count * query.shape[1])
    positions = torch.arange(first, context, device=query.device)
    parts = []
    for start, rows in _tiles(query, max(1, size)):
        end = count - length + start + rows.shape[0]  # keys up to the tile's last query
        visible = options.visible(positions[end - rows.shape[0] : end], positions[:end])
        own = options.of_rows(slice(start, start + rows.shape[0]))
        parts.append(attend(rows, key[:end], value[:end], visible, own))
    return torch.cat(parts)


def _tiles(query: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields `size` rows at a time, with the index of the first."""
    for start in range(0, query.shape[0], size):
        yield start, query[start : start + size]


def _decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attend for one query token that sees every key: the G heads of a query group become G rows of one product."""
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    folded = query.view(heads, groups, -1)
    output = F.scaled_dot_product_attention(
        folded[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None], scale=scaling
    )
    return output.view(1, heads * groups, -1)


def _chunk(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attend for a prefill chunk after a longer past, on a CPU: to the past without a mask and to the chunk causally.

    The results are merged by their log-sum-exp. Faster than one call with a mask, which is read from memory as
    float32. query: [n, Hq, d]; key, value: [m, Hkv, d].
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    length, heads, width = query.shape
    past = key.shape[0] - length
    queries, keys, values = (x.transpose(0, 1)[None] for x in (query, key, value))
    own, own_lse = attend(queries, keys[:, :, past:], values[:, :, past:], is_causal=True, scale=scaling)
    # Without a mask, the heads of a query group are additional rows.
    folded = queries.reshape(1, key.shape[1], -1, width)
    past_output, past_lse = attend(folded, keys[:, :, :past], values[:, :, :past], scale=scaling)
    past_weight = torch.sigmoid(past_lse.reshape(heads, length, 1) - own_lse.reshape(heads, length, 1))
    merged = torch.lerp(own[0].float(), past_output.reshape(heads, length, width).float(), past_weight)
    return merged.to(query.dtype).transpose(0, 1)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, options: AttentionOptions
) -> torch.Tensor:
    """Torch's fused attention; `visible` None means causal from position 0."""
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=visible,
        is_causal=visible is None,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)


def _explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Unfused attention, for soft caps and parameters per head. The queries are the last of the keys' positions."""
    length, query_heads, width = query.shape
    heads, groups = key.shape[1], query_heads // key.shape[1]
    folded = query.view(length, heads, groups, width).permute(1, 2, 0, 3)  # [Hkv, G, n, d]
    scores = torch.matmul(folded, key.permute(1, 2, 0)[:, None]).float() * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if options.alibi is not None:
        places = torch.arange(key.shape[0], device=key.device)
        scores = scores + options.alibi.view(heads, groups, 1, 1) * (places - places[-length:, None])
    if options.relative is not None:
        scores = scores + _relative_logits(options.relative, key.shape[0]).view(scores.shape)
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = _softmax_with_sinks(scores, options.sinks).to(value.dtype)
    output = torch.matmul(weights, value.permute(1, 0, 2)[:, None])  # [Hkv, G, n, dv]
    return output.permute(2, 0, 1, 3).reshape(length, query_heads, -1)


def _relative_logits(relative: torch.Tensor, count: int) -> torch.Tensor:
    """relative: [n, Hq, E], of the queries at the last of `count` positions; returns [Hq, n, count] float32."""
    length, heads, extent = relative.shape
    places = torch.arange(count, device=relative.device)
    distances = places[count - length :, None] - places
    reached = (distances >= 0) & (distances < extent)
    index = distances.clamp(0, extent - 1).expand(heads, -1, -1)
    return relative.transpose(0, 1).float().gather(2, index).masked_fill(~reached, 0.0)


def _softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension with one extra logit, the sink, whose weight is dropped.

    sinks: [Hq] or [n, Hq].
    """
    if sinks is None:
        return scores.softmax(dim=-1)
    heads, groups, length, _ = scores.shape
    sink = sinks.float().expand(length, -1).t().reshape(heads, groups, length, 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
