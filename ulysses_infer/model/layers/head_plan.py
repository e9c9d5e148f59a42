"""`HeadPlan`: which heads an attention layer computes in the current mode."""

from __future__ import annotations

import functools

import torch

from ulysses_infer.cache.paged import CacheScales
from ulysses_infer.model.layers.latent import LatentAttention
from ulysses_infer.parallel.layout import Mode, Place, Span, even_span, key_value_span


class HeadPlan:
    """The local heads of an attention layer in the current mode, and the KV head that each shard receives."""

    def __init__(self, num_attention_heads: int, num_key_value_heads: int) -> None:
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.local_attention_heads = num_attention_heads
        self.local_key_value_heads = num_key_value_heads
        self.shard_heads = Span(0, num_attention_heads)
        self.shard_key_value_heads = num_key_value_heads
        """KV heads that this rank caches, in every mode."""
        self.cache_scales: CacheScales | None = None
        self.latent: LatentAttention | None = None
        self._mode = Mode(1, 1)
        self._order: list[int] | None = None
        self._indices: dict[Mode, torch.Tensor] = {}

    def bind(self, place: Place) -> None:
        """Switch to the head counts of `place`'s mode."""
        index, count = place.weight_index, place.mode.tp
        held = key_value_span(self.num_key_value_heads, index, count)
        self.local_attention_heads = self.num_attention_heads // count
        self.local_key_value_heads = held.size
        self.shard_heads = even_span(self.num_attention_heads, place.shard, place.world_size)
        self.shard_key_value_heads = key_value_span(self.num_key_value_heads, place.shard, place.world_size).size
        self._order = _order_of_key_value_heads(self.num_key_value_heads, place)
        self._mode = place.mode

    def use_latent(self, latent: LatentAttention) -> None:
        """Let all query heads attend to one KV head, the latent. Call it before the first `bind`."""
        self.latent, self.num_key_value_heads = latent, 1

    def key_value_index(self, device: torch.device) -> torch.Tensor | None:
        """The local KV head to send to each receiving head, in order; None if each is sent once, in order."""
        if self._order is None:
            return None
        if self._mode not in self._indices:
            self._indices[self._mode] = torch.tensor(self._order, device=device)
        return self._indices[self._mode]


@functools.cache
def _order_of_key_value_heads(count: int, place: Place) -> list[int] | None:
    """The local KV head that each receiving head is, in order; None if each is sent once, in order.

    The projection computes each KV head once; heads that several shards need are replicated for the all-to-all.
    """
    held = key_value_span(count, place.weight_index, place.mode.tp)
    shards = range(place.weight_index * place.mode.sp, (place.weight_index + 1) * place.mode.sp)
    order = [head - held.start for shard in shards for head in range(*key_value_span(count, shard, place.world_size))]
    return None if order == list(range(held.size)) else order
