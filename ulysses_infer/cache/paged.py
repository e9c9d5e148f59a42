"""The KV cache tensors of one rank: blocks of keys and values of its head shard, the same in every mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.cache.entries import EntryShape
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.kernels.launch import has_fp8, runs_kernels
from ulysses_infer.native.function import ELEMENTWISE, native_function

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


@dataclass(frozen=True)
class IndexShape:
    """The layers that cache keys of an index (learned sparse attention) beside their own, one head of `width` each.

    The head is replicated: every rank scores the keys for its own tokens, as its mode divides them.
    """

    layers: frozenset[int]
    width: int
    dtype: torch.dtype


class LayerShape(NamedTuple):
    """What one layer caches of each token on one rank. Key and value widths may differ."""

    num_key_value_heads: int
    key_width: int
    value_width: int
    values_in_keys: bool = False
    """Whether values are the first elements of the keys (MLA latents) and not stored separately."""

    @property
    def elements(self) -> int:
        """Cached elements per token."""
        return self.num_key_value_heads * (self.key_width + (0 if self.values_in_keys else self.value_width))


@dataclass(frozen=True)
class CacheShape:
    """Shape of one rank's cache, layer by layer."""

    layers: tuple[LayerShape | None, ...]
    """None: the layer has no cache of its own."""
    block_size: int
    dtype: torch.dtype
    sources: tuple[tuple[int, int], ...] = ()
    """Pairs of a layer without a cache of its own and the layer whose keys and values it reads."""
    index: IndexShape | None = None
    entries: tuple[EntryShape, ...] = ()
    entry_dtype: torch.dtype | None = None
    """Of entries that are not joined to keys; None: `dtype`."""

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        num_key_value_heads: int,
        key_width: int,
        value_width: int,
        block_size: int,
        dtype: torch.dtype,
        values_in_keys: bool = False,
        index: IndexShape | None = None,
    ) -> CacheShape:
        """The shape of `num_layers` layers that are alike."""
        layer = LayerShape(num_key_value_heads, key_width, value_width, values_in_keys)
        return cls((layer,) * num_layers, block_size, dtype, index=index)

    @property
    def num_layers(self) -> int:
        """Layers of the model, with a cache or without."""
        return len(self.layers)

    @property
    def own_layers(self) -> list[LayerShape]:
        """The layers that have a cache of their own."""
        return [layer for layer in self.layers if layer is not None]

    @property
    def values_in_keys(self) -> bool:
        """Whether a layer caches latents."""
        return any(layer.values_in_keys for layer in self.own_layers)

    @property
    def selects_keys(self) -> bool:
        """Whether attention of some layer reads single slots, chosen for each token."""
        return self.index is not None or any(entry.is_joined for entry in self.entries)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers."""
        return sum(map(self.bytes_of_layer, range(self.num_layers))) + sum(map(self.bytes_of_entry, self.entries))

    def dtype_of_entry(self, entry: EntryShape) -> torch.dtype:
        """The dtype of `entry`, one of `entries`."""
        return self.dtype if entry.is_joined or self.entry_dtype is None else self.entry_dtype

    def bytes_of_entry(self, entry: EntryShape) -> int:
        """Bytes of the rows of `entry`, one of `entries`, in one block."""
        return entry.per_block(self.block_size) * entry.width * self.dtype_of_entry(entry).itemsize

    def bytes_of_group(self, groups: CacheGroups, group: int) -> int:
        """Bytes of one block of a cache group: in the layers of the group, and of the entries in it."""
        own = (entry for entry, number in zip(self.entries, groups.of_entries, strict=True) if number == group)
        return sum(map(self.bytes_of_layer, groups.layers_of(group))) + sum(map(self.bytes_of_entry, own))

    def bytes_of_layer(self, layer: int) -> int:
        """Bytes of one block's keys and values in `layer`, and of its index keys."""
        own = self.layers[layer]
        values = 0 if own is None else own.elements * self.dtype.itemsize
        indexed = self.index is not None and layer in self.index.layers
        index_bytes = self.index.width * self.index.dtype.itemsize if indexed and self.index is not None else 0
        return self.block_size * (values + index_bytes)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed for `num_tokens` tokens of one sequence."""
        return ceil_div(num_tokens, self.block_size)


class CacheScales(NamedTuple):
    """Dequantization scales of the cached keys and values of a layer."""

    key: float = 1.0
    value: float = 1.0


class PagedCache:
    """keys[layer], values[layer]: [num_blocks, block_size, Hkv, width], with the Hkv heads of this rank's shard.

    index_keys[layer]: [num_blocks, block_size, 1, width] of the layers with an index, the same on every rank.
    entries[layer, name]: [num_blocks, entries per block, 1, width], the same on every rank.
    All layers of a cache group have the same number of blocks. A layer that reads another layer's cache has the same
    tensors; one without a cache has empty ones.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_blocks: int | Sequence[int],
        device: torch.device,
        scratch_blocks: int = 0,
        groups: CacheGroups | None = None,
    ) -> None:
        """num_blocks: one per cache group; groups: None means a single one with full attention.

        scratch_blocks: additional blocks, unknown to the allocators, for padding rows.
        """
        self.shape, self.device = shape, device
        self.groups = groups or CacheGroups.single(shape.num_layers, num_entries=len(shape.entries))
        self.blocks_of_groups = (num_blocks,) if isinstance(num_blocks, int) else tuple(num_blocks)
        self._scratch_blocks = scratch_blocks
        pairs = zip(shape.entries, self.groups.of_entries, strict=True)
        self._entry_shapes = {(entry.layer, entry.name): (entry, group) for entry, group in pairs}
        self._joined_layers = {entry.layer for entry in shape.entries if entry.is_joined}
        on_cpu = device.type == "cpu"
        self._store = native_function("attention", "store_rows", "pppiii", ELEMENTWISE) if on_cpu else None
        self._has_kernel = has_fp8(device) if shape.dtype == FP8 else runs_kernels(device)
        self.take()

    def take(self) -> None:
        """Allocate the memory; its content is undefined."""
        self.entries: dict[tuple[int, str], torch.Tensor] = {}
        self._joined: dict[int, torch.Tensor] = {}
        pairs = [self._take_layer(layer) for layer in range(self.shape.num_layers)]
        for layer, source in self.shape.sources:
            pairs[layer] = pairs[source]
        self.keys, self.values = [keys for keys, _ in pairs], [values for _, values in pairs]
        self._take_entries()
        index = self.shape.index
        self.index_keys: dict[int, torch.Tensor] = {}
        if index is not None:
            self.index_keys = {n: self._allocate(n, 1, index.width, index.dtype) for n in sorted(index.layers)}

    def release(self) -> None:
        """Free the memory, until `take`."""
        self.keys, self.values, self.index_keys, self.entries, self._joined = [], [], {}, {}, {}

    def _take_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer; empty if it has no cache of its own, or one that `_take_entries` allocates."""
        shape, dtype = self.shape.layers[layer], self.shape.dtype
        if shape is None or layer in self._joined_layers:
            nothing = torch.empty(0, dtype=dtype, device=self.device)
            return nothing, nothing
        keys = self._allocate(layer, shape.num_key_value_heads, shape.key_width, dtype)
        if shape.values_in_keys:
            return keys, keys[..., : shape.value_width]
        return keys, self._allocate(layer, shape.num_key_value_heads, shape.value_width, dtype)

    def _take_entries(self) -> None:
        """Allocate the entries, those that attention reads with keys behind the keys of their layer."""
        for key, (entry, group) in self._entry_shapes.items():
            blocks, size = self.blocks_of_groups[group] + self._scratch_blocks, entry.per_block(self.shape.block_size)
            if entry.is_joined:
                rows = self._join(entry.layer, blocks * size)
            else:
                like = self.shape.dtype_of_entry(entry)
                rows = torch.empty((blocks * size, 1, entry.width), dtype=like, device=self.device)
            self.entries[key] = rows.unflatten(0, (blocks, size))

    def _join(self, layer: int, count: int) -> torch.Tensor:
        """Allocate the keys of `layer` with `count` further rows behind them; returns those, [count, 1, width]."""
        shape = self.shape.layers[layer]
        assert shape is not None
        assert shape.values_in_keys
        blocks = self._num_blocks_of(layer) + self._scratch_blocks
        slots = blocks * self.shape.block_size
        size = slots + count, shape.num_key_value_heads, shape.key_width
        joined = self._joined[layer] = torch.empty(size, dtype=self.shape.dtype, device=self.device)
        self.keys[layer] = joined[:slots].unflatten(0, (blocks, -1))
        self.values[layer] = self.keys[layer][..., : shape.value_width]
        return joined[slots:]

    def _allocate(self, layer: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        shape = self._num_blocks_of(layer) + self._scratch_blocks, self.shape.block_size, heads, width
        # Not touched before it is written: on a CPU, pages are allocated when blocks are first used.
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _num_blocks_of(self, layer: int) -> int:
        group = self.groups.of_layer[layer]
        return 0 if group is None else self.blocks_of_groups[group]

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the step's keys and values. slots: [T]; key: [T, Hkv, d]; value: [T, Hkv, dv]."""
        shape = self.shape.layers[layer]
        assert shape is not None, f"layer {layer} has no cache of its own"
        if self._has_kernel:
            from ulysses_infer.kernels.cache import store

            keys, values = self.rows(layer)
            store(keys, None if shape.values_in_keys else values, slots, key, value)
            return
        self._store_rows(self.keys[layer], slots, key)
        if not shape.values_in_keys:
            self._store_rows(self.values[layer], slots, value)

    def write_index(self, layer: int, slots: torch.Tensor, key: torch.Tensor) -> None:
        """Store the step's index keys of `layer`. slots: [T]; key: [T, width]."""
        self._write_one_head(self.index_keys[layer], slots, key)

    def write_entries(self, layer: int, name: str, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Store entries. slots: [n]; rows: [n, width]."""
        self._write_one_head(self.entries[layer, name], slots, rows)

    def _write_one_head(self, cached: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """cached: [blocks, size, 1, width]; slots: [n]; rows: [n, width]."""
        new = rows[:, None]
        if has_fp8(self.device) if cached.dtype == FP8 else runs_kernels(self.device):
            from ulysses_infer.kernels.cache import store

            store(cached.flatten(0, 1), None, slots, new, new)
        else:
            self._store_rows(cached, slots, new)

    def _store_rows(self, cached: torch.Tensor, slots: torch.Tensor, new: torch.Tensor) -> None:
        """cached: [blocks, size, H, d]; new: [T, H, d]."""
        if self._store is not None and new.dtype == cached.dtype and _is_dense(new):
            size = cached.dtype.itemsize
            self._store(
                cached.data_ptr(),
                slots.data_ptr(),
                new.data_ptr(),
                len(slots),
                new[0].numel() * size,
                new.stride(0) * size,
            )
            return
        if cached.dtype == FP8:  # saturate to the largest representable value; torch copies float8 as bytes
            new, cached = new.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8), cached.view(torch.uint8)
        cached.flatten(0, 1).index_copy_(0, slots, new.to(cached.dtype))

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that `layer` attends to, its own or another layer's."""
        return self.keys[layer], self.values[layer]

    def slots_of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`of_layer` in blocks of one slot, [slots, 1, Hkv, d | dv]; then the entries that are joined to the keys."""
        joined = self._joined.get(layer)
        if joined is None:
            return by_slots(self.keys[layer]), by_slots(self.values[layer])
        return joined[:, None], joined[:, None, :, : self.values[layer].shape[-1]]

    def first_joined_slot(self, layer: int) -> int:
        """The slot of the first joined entry of `layer` in `slots_of_layer`."""
        return self.keys[layer].shape[0] * self.shape.block_size

    def entry_shape(self, layer: int, name: str) -> EntryShape:
        """The shape of a kind of entries."""
        return self._entry_shapes[layer, name][0]

    def group_of_entries(self, layer: int, name: str) -> int:
        """The cache group whose blocks hold a kind of entries."""
        return self._entry_shapes[layer, name][1]

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache by slots, for kernels that write it: keys [slots, Hkv, d] and values [slots, Hkv, dv]."""
        return self.keys[layer].flatten(0, 1), self.values[layer].flatten(0, 1)

    def tensors_of_group(self, group: int) -> list[torch.Tensor]:
        """What a block of a cache group consists of: tensors of [blocks, ...] each, none of them twice."""
        tensors = []
        for layer in self.groups.layers_of(group):
            shape = self.shape.layers[layer]
            if shape is not None:
                tensors += [self.keys[layer]] if shape.values_in_keys else [self.keys[layer], self.values[layer]]
            if layer in self.index_keys:
                tensors.append(self.index_keys[layer])
        return tensors + [rows for key, rows in self.entries.items() if self._entry_shapes[key][1] == group]

    @property
    def num_blocks(self) -> int:
        """Blocks of the first cache group, which limits the length of texts."""
        return self.blocks_of_groups[0]

    def scratch_block(self, group: int) -> int:
        """The first scratch block of a cache group."""
        assert self._scratch_blocks > 0
        return self.blocks_of_groups[group]

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, Hkv, d] and values [n, Hkv, dv] at `slots`; for tests and tools."""
        return self.keys[layer].flatten(0, 1)[slots], self.values[layer].flatten(0, 1)[slots]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(
            count * self.shape.bytes_of_group(self.groups, group) for group, count in enumerate(self.blocks_of_groups)
        )


def by_slots(cache: torch.Tensor) -> torch.Tensor:
    """cache: [blocks, size, H, d]; the same with blocks of one slot, [slots, 1, H, d]."""
    blocks, size, *heads = cache.shape
    _, slot, *strides = cache.stride()  # kept for dimensions of size 1, which `flatten` would not do
    return cache.as_strided((blocks * size, 1, *heads), (slot, slot, *strides))


def _is_dense(rows: torch.Tensor) -> bool:
    """[T, H, d]: whether the elements of each token are contiguous."""
    return len(rows) > 0 and rows.stride(2) == 1 and (rows.stride(1) == rows.shape[2] or rows.shape[1] == 1)
