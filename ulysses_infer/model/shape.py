"""The sizes of a model that the engine needs, with the attention heads of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ulysses_infer.cache.entries import EntryShape
from ulysses_infer.cache.paged import CacheShape, IndexShape, LayerShape
from ulysses_infer.parallel.head_layout import HeadLayout, head_layout
from ulysses_infer.parallel.layout import Layout


class LayerHeads(NamedTuple):
    """The attention heads of one layer, over all ranks."""

    num_attention_heads: int
    num_key_value_heads: int
    key_width: int
    value_width: int
    values_in_keys: bool = False
    """Whether the cache holds MLA latents: one key per token, whose first elements are the value."""
    source: int | None = None
    """The layer whose keys and values it reads instead of caching its own."""
    index_width: int = 0
    """Width of the keys of its index, which are cached beside (learned sparse attention); 0: it has none."""

    def cached_by(self, shard: int, layout: Layout) -> int:
        """Number of KV heads that `shard` reads from the cache, in every mode."""
        return self.on(layout).key_value_slots

    def on(self, layout: Layout) -> HeadLayout:
        """Which heads every rank of `layout` has."""
        return head_layout(layout.world_size, self.num_attention_heads, self.num_key_value_heads)


NO_HEADS = LayerHeads(0, 0, 0, 0)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the engine needs."""

    layers: tuple[LayerHeads | None, ...]
    """None: the layer has no attention."""
    hidden_size: int
    residual_width: int
    """Elements per token that a layer hands to the next: several times `hidden_size` with AltUp (gemma3n)."""
    intermediate_size: int
    """Elements per token of the widest temporary tensor of a layer."""
    vocab_size: int
    max_model_len: int
    entries: tuple[EntryShape, ...] = ()
    """What layers cache beside keys and values."""

    @property
    def num_layers(self) -> int:
        """Number of layers, with attention or without."""
        return len(self.layers)

    @property
    def first_heads(self) -> LayerHeads:
        """The heads of the first layer with attention. Most models have the same in every layer."""
        return next((layer for layer in self.layers if layer is not None), NO_HEADS)

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first layer with attention."""
        return self.first_heads.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """KV heads of the first layer with attention."""
        return self.first_heads.num_key_value_heads

    @property
    def key_width(self) -> int:
        """Width of a key of the first layer with attention."""
        return self.first_heads.key_width

    @property
    def value_width(self) -> int:
        """Width of a value of the first layer with attention."""
        return self.first_heads.value_width

    @property
    def values_in_keys(self) -> bool:
        """Whether a layer caches latents."""
        return any(layer is not None and layer.values_in_keys for layer in self.layers)

    @property
    def has_index(self) -> bool:
        """Whether a layer selects the slots that a token attends to."""
        has_index = any(layer is not None and layer.index_width > 0 for layer in self.layers)
        return has_index or any(entry.is_joined for entry in self.entries)

    def key_value_heads_of(self, shard: int, layout: Layout) -> int:
        """Number of KV heads that `shard` caches of the first layer with attention, in every mode."""
        return self.first_heads.cached_by(shard, layout)

    def costs_of_padding(self, layout: Layout) -> list[str]:
        """What the padding of heads costs on `layout`, in one line for each kind of layer that needs any."""
        kinds = dict.fromkeys(each.on(layout) for each in self.layers if each is not None)
        return [heads.cost_of_padding(layout.base) for heads in kinds if heads.is_padded]

    def cache_shape(
        self, shard: int, layout: Layout, block_size: int, dtype: torch.dtype, index_dtype: torch.dtype | None = None
    ) -> CacheShape:
        """The shape of the cache of `shard`, the same in every mode.

        index_dtype: of index keys, and of entries that are not joined to keys; None: `dtype`. Raises `ConfigError` if
        entries do not fit the blocks.
        """
        layers = [None if each is None else _own_cache(each, shard, layout) for each in self.layers]
        sources = [(layer, each.source) for layer, each in enumerate(self.layers) if each and each.source is not None]
        indexed = {layer: each.index_width for layer, each in enumerate(self.layers) if each and each.index_width}
        index = IndexShape(frozenset(indexed), max(indexed.values()), index_dtype or dtype) if indexed else None
        for entry in self.entries:
            entry.check_block_size(block_size)
        return CacheShape(tuple(layers), block_size, dtype, tuple(sources), index, self.entries, index_dtype)


def _own_cache(heads: LayerHeads, shard: int, layout: Layout) -> LayerShape | None:
    if heads.source is not None:
        return None
    return LayerShape(heads.cached_by(shard, layout), heads.key_width, heads.value_width, heads.values_in_keys)
