"""Which heads an attention layer computes in the current mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ulysses_infer.cache.paged import CacheScales
from ulysses_infer.parallel.layout import Mode, Place, Span, even_span, key_value_span

if TYPE_CHECKING:
    from ulysses_infer.model.layers.latent import LatentAttention


class HeadPlan:
    """Which heads an attention module has in the current mode, and which KV head each receiving shard needs."""

    def __init__(self, num_attention_heads: int, num_key_value_heads: int) -> None:
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.local_attention_heads = num_attention_heads
        self.local_key_value_heads = num_key_value_heads
        self.shard_heads = Span(0, num_attention_heads)
        self.cache_scales: CacheScales | None = None
        self.latent: LatentAttention | None = None
        self._mode = Mode(1, 1)
        self._order: list[int] | None = None
        self._indices: dict[Mode, torch.Tensor] = {}

    def bind(self, place: Place) -> None:
        """Take the head counts of `place`'s mode."""
        index, count = place.weight_index, place.mode.tp
        held = key_value_span(self.num_key_value_heads, index, count)
        self.local_attention_heads = self.num_attention_heads // count
        self.local_key_value_heads = held.size
        self.shard_heads = even_span(self.num_attention_heads, place.shard, place.world_size)
        order = [
            head - held.start
            for shard in range(index * place.mode.sp, (index + 1) * place.mode.sp)
            for head in range(*key_value_span(self.num_key_value_heads, shard, place.world_size))
        ]
        # KV heads are replicated while packing, and only then: the projection computed each of them once.
        self._order = None if order == list(range(held.size)) else order
        self._mode = place.mode

    def use_latent(self, latent: LatentAttention) -> None:
        """All query heads attend to one key/value head, a latent. To be called before any mode is bound."""
        self.latent, self.num_key_value_heads = latent, 1

    def key_value_index(self, device: torch.device) -> torch.Tensor | None:
        """Local KV head that goes to each receiving head of the mode, in order; None when each goes to one, its own."""
        if self._order is None:
            return None
        if self._mode not in self._indices:
            self._indices[self._mode] = torch.tensor(self._order, device=device)
        return self._indices[self._mode]
