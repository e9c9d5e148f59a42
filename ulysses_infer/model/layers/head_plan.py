"""`HeadPlan`: which heads an attention layer computes in the current mode."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from ulysses_infer.cache.entries import EntryShape
from ulysses_infer.cache.paged import CacheScales
from ulysses_infer.model.layers.latent import LatentAttention
from ulysses_infer.model.layers.temperature import Temperature
from ulysses_infer.native.function import ELEMENTWISE, NativeFunction, native_function, recording_paused
from ulysses_infer.parallel.head_layout import Arrangement, HeadLayout
from ulysses_infer.parallel.layout import Mode, Place


class HeadPlan:
    """The local heads of an attention layer in the current mode, and their order for attention.

    The projections compute each local head once. Before attention, KV heads that several shards need are repeated, and
    where heads do not divide over the ranks, padding makes all shards and query groups equal; after attention, the
    output of padding is dropped.
    """

    def __init__(self, heads: HeadLayout) -> None:
        self.heads = heads
        self.local_attention_heads = heads.num_attention_heads
        """Query heads that the projections of this mode compute."""
        self.first_heads = (0, 0)
        """The first query head and the first KV head among them."""
        self.local_key_value_heads = heads.num_key_value_heads
        self.cache_scales: CacheScales | None = None
        self.latent: LatentAttention | None = None
        self.index_width = 0
        """Width of the layer's index keys, if it has an index (learned sparse attention)."""
        self.entries: tuple[EntryShape, ...] = ()
        """What the layer caches beside its keys and values."""
        self.values_are_keys = False
        """Whether values are not exchanged and cached, because they are the keys or a part of them."""
        self.source: int | None = None
        """The layer whose keys and values this one reads, if it caches none of its own."""
        self.temperature: Temperature | None = None
        """Scales queries by position, if the layer has one."""
        self._mode = Mode(heads.world_size, 1)
        self._arranged = heads.arrangement(Place(self._mode, 0, heads.world_size))
        self._arrangements: dict[Mode, Arrangement] = {}
        self._indices: dict[tuple[str, Mode, torch.device], torch.Tensor] = {}

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the whole layer."""
        return self.heads.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """KV heads of the whole layer: one if it caches latents."""
        return self.heads.num_key_value_heads

    @property
    def shard_attention_heads(self) -> int:
        """Query heads that attention computes on this rank in this mode, padding included."""
        return len(self._arranged.per_shard)

    @property
    def shard_key_value_heads(self) -> int:
        """KV heads that this rank caches, in every mode."""
        return self.heads.key_value_slots

    def bind(self, place: Place) -> None:
        """Switch to the heads of `place`."""
        index, count = place.weight_index, place.mode.tp
        self.local_attention_heads = self.heads.query_span(index, count).size
        self.local_key_value_heads = self.heads.key_value_span(index, count).size
        self._mode = place.mode
        self.first_heads = self.heads.query_span(index, count).start, self.heads.key_value_span(index, count).start
        if place.mode not in self._arrangements:
            self._arrangements[place.mode] = self.heads.arrangement(place)
        self._arranged = self._arrangements[place.mode]

    def use_latent(self, latent: LatentAttention) -> None:
        """Let all query heads attend to one KV head, the latent. Call it before the first `bind`."""
        self.latent, self.heads, self.values_are_keys = latent, self.heads.with_shared_key(), True

    def query_index(self, device: torch.device) -> torch.Tensor | None:
        """The local query head at each place of attention; None if each occurs once, in order."""
        return self._index("queries", self._arranged.queries, device)

    def key_value_index(self, device: torch.device) -> torch.Tensor | None:
        """The local KV head of each slot of attention; None if each occurs once, in order."""
        return self._index("key_values", self._arranged.key_values, device)

    def arranged(self, query: torch.Tensor, *key_values: torch.Tensor) -> list[torch.Tensor]:
        """Local heads, each [t, heads, d], in the order that attention or its all-to-all takes."""
        return [_take_heads(query, self.query_index(query.device)), *self.arranged_key_values(*key_values)]

    def arranged_key_values(self, *key_values: torch.Tensor) -> list[torch.Tensor]:
        """`arranged` without queries."""
        return [_take_heads(each, self.key_value_index(each.device)) for each in key_values]

    def restored(self, output: torch.Tensor) -> torch.Tensor:
        """The output of attention for the local query heads: [t, places, dv] to [t, Hq/tp, dv].

        Those that another weight slice has, too, are zero here.
        """
        before, after = self._arranged.borrowed
        own = _take_heads(output, self._index("returned", self._arranged.returned, output.device))
        return F.pad(own, (0, 0, before, after)) if before or after else own

    def of_shard(self, per_head: torch.Tensor) -> torch.Tensor:
        """The entries of `per_head` [Hq, ...] (sinks, ALiBi slopes) for the query heads that attention sees here."""
        heads = self._arranged.per_shard
        if heads == tuple(range(heads[0], heads[0] + len(heads))):
            return per_head[heads[0] : heads[0] + len(heads)]
        return _select(per_head, self._index("per_shard", heads, per_head.device))

    def of_key_value_shard(self, per_head: torch.Tensor) -> torch.Tensor:
        """The entries of `per_head` [Hkv, ...] for the KV heads that this rank caches."""
        return _select(per_head, self._index("cached", self._arranged.cached, per_head.device))

    def _index(self, name: str, order: tuple[int, ...] | None, device: torch.device) -> torch.Tensor | None:
        if order is None:
            return None
        key = name, self._mode, device
        if key not in self._indices:
            with recording_paused():  # it is the same in every step
                self._indices[key] = torch.tensor(order, dtype=torch.int64, device=device)
        return self._indices[key]


def _select(per_head: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return per_head if index is None else per_head.index_select(0, index)


def _take_heads(heads: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The heads `order` of `heads: [t, n, d]`: [t, m, d]; None: all, as they are."""
    if order is None:
        return heads
    native = _native_take_heads() if heads.is_cpu and heads.stride(2) == 1 else None
    if native is None:
        return heads.index_select(1, order)
    taken, size = heads.new_empty(len(heads), len(order), heads.shape[2]), heads.element_size()
    shape = len(heads), len(order), heads.shape[2] * size, heads.stride(0) * size, heads.stride(1) * size
    native(taken.data_ptr(), heads.data_ptr(), order.data_ptr(), *shape)
    return taken


@functools.cache
def _native_take_heads() -> NativeFunction | None:
    """`_take_heads` on a CPU, which CPU graphs replay without Python."""
    return native_function("elementwise", "take_heads", "pppiiiii", ELEMENTWISE)
