"""Multi-head latent attention (MLA) over a cache of latents, one per token and layer in every mode.

An MLA layer (DeepSeek-V2, arXiv 2405.04434 §2.1) computes the keys and values of all heads from one latent: `c`, which
`kv_b_proj` expands, and `r`, a rotary part that the keys of all heads share. Let `U` and `V` be the rows of `kv_b_proj`
for a head's key and value. Then [q, s] · [U c, r] = [Uᵀ q, s] · [c, r] and Σ w (V c) = V (Σ w c). So U and V can be
absorbed into queries and outputs, and all heads share one KV head: its key is the latent, its value is `c`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata, AttentionOptions
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.layers.latent_chunks import LatentSplit, expand_head_chunks, split_sequences
from ulysses_infer.parallel.layout import Place

FEW_ROWS = 32  # with fewer rows, transpose the rows: on a CPU, torch would copy the transposed weight
WeightReader = Callable[[torch.dtype], torch.Tensor]


class KeyValueExpansion(Protocol):
    """`kv_b_proj`, sharded by heads."""

    def reader(self, place: Place) -> WeightReader:
        """A function from a dtype to the weight rows of `place`, [H * (key + value), latent]."""
        ...


class LatentWidths(NamedTuple):
    """Widths of an MLA layer's latent and heads."""

    latent: int
    """Width of `c`: `kv_lora_rank`."""
    rotary: int
    """Width of `r`, and of the rotary part of a query."""
    key: int
    """Width of a head's key without `r`."""
    value: int

    @classmethod
    def of(cls, module: Any) -> LatentWidths:
        """The widths of a transformers MLA module. Raises AttributeError if it has not all of them."""
        return cls(module.kv_lora_rank, module.qk_rope_head_dim, module.qk_nope_head_dim, module.v_head_dim)

    @property
    def cached(self) -> int:
        """Cached elements per token and layer."""
        return self.latent + self.rotary

    def prefers_expansion(self, length: int, context: int) -> bool:
        """Whether attention of the last `length` of `context` tokens is cheaper over expanded keys and values.

        Expansion costs extra per token of context; latents, which are wider than heads, cost extra per token pair.
        """
        if length == 1:
            return False
        expanding = (context - length) * self.latent * (self.key + self.value)
        pairs = length * (context - length) + length * (length + 1) // 2
        return expanding < pairs * (2 * self.latent - self.key - self.value)

    def absorb(self, query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """query: [T, H, key + rotary]; weight: [H, key + value, latent]; returns [T, H, latent + rotary]."""
        plain, rotated = query.split((self.key, self.rotary), dim=-1)
        absorbed = torch.bmm(plain.transpose(0, 1), weight[:, : self.key])
        return torch.cat((absorbed.transpose(0, 1), rotated), dim=-1)

    def project_values(self, output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """output: [T, H, latent]; weight: [H, key + value, latent]; returns [T, H, value]."""
        values = weight[:, self.key :]
        if output.shape[0] < FEW_ROWS:
            return torch.bmm(values, output.permute(1, 2, 0)).permute(2, 0, 1)
        return torch.bmm(output.transpose(0, 1), values.transpose(1, 2)).transpose(0, 1)

    def expand(self, latents: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """latents: [n, latent + rotary]; weight: [H, key + value, latent].

        Returns keys [n, H, key + rotary] and values [n, H, value].
        """
        expanded = (latents[:, : self.latent] @ weight.flatten(0, 1).t()).unflatten(1, weight.shape[:2])
        rotated = latents[:, None, self.latent :].expand(-1, weight.shape[0], -1)
        return torch.cat((expanded[..., : self.key], rotated), dim=-1), expanded[..., self.key :].contiguous()


class LatentAttention:
    """Attention of one layer's local heads over latents. `join` replaces the module's `expand_kv`."""

    def __init__(self, widths: LatentWidths, projection: KeyValueExpansion, own: Place) -> None:
        """`own`: the place whose heads are those of this rank's shard, the same in every mode."""
        self.widths = widths
        self._projection, self._own = projection, own
        self._read: WeightReader = projection.reader(own)
        self._joined: tuple[torch.Tensor, torch.Tensor] | None = None

    def bind(self, place: Place) -> None:
        """Refresh the view of the weight, which is the same in every mode but may have changed address."""
        self._read = self._projection.reader(self._own)

    def join(self, plain: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """plain: [1, 1, t, latent]; rotated: [1, 1, t, rotary]; returns the latent as key and its `c` as value."""
        latents = torch.cat((plain, rotated), dim=-1)
        self._joined = latents, latents[..., : self.widths.latent]
        return self._joined

    def check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise `UnsupportedModelError` unless `key` and `value` are the tensors that `join` returned."""
        joined, self._joined = self._joined, None
        if joined is None or key is not joined[0] or value is not joined[1]:
            raise UnsupportedModelError("the model changes keys or values after expand_kv; set cache.latent to false")

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        backend: AttentionBackend,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """query: [T, H, key + rotary]; keys, values: the cache, [blocks, size, 1, cached | latent].

        Returns [T, H, value]. Long chunks attend over keys and values that are expanded for the step, all others over
        latents. Heads without weights, the last ones, are padding.
        """
        weight = self._read(query.dtype).unflatten(0, (-1, self.widths.key + self.widths.value))
        padding = query.shape[1] - weight.shape[0]
        if padding:
            attended = self.attend(query[:, :-padding], keys, values, backend, metadata, options)
            return F.pad(attended, (0, 0, 0, padding))
        if options.sliding_window is None and options.chunk_size is None:
            parts = split_sequences(metadata, keys.shape[1], self.widths.prefers_expansion)
        else:
            parts = LatentSplit()  # blocks before a window may have been freed
        if parts.expanded is None:
            return self._absorbed(query, weight, keys, values, backend, metadata, options)
        output = query.new_empty(*query.shape[:2], self.widths.value)
        rows, part = parts.expanded.rows, parts.expanded.metadata
        for heads, key, value in expand_head_chunks(parts.expanded, keys, weight, self.widths.expand, query.dtype):
            output[rows, heads] = backend.attend(query[rows, heads], key, value, part, options)
        if parts.absorbed is not None:
            rows, part = parts.absorbed.rows, parts.absorbed.metadata
            output[rows] = self._absorbed(query[rows], weight, keys, values, backend, part, options)
        return output

    def _absorbed(
        self,
        query: torch.Tensor,
        weight: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        backend: AttentionBackend,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        absorbed = self.widths.absorb(query, weight)
        return self.widths.project_values(backend.attend(absorbed, keys, values, metadata, options), weight)
