"""Multi-head latent attention (MLA) over cached latents: one per token and layer, the same in every mode.

A layer of this kind (DeepSeek-V2, arXiv 2405.04434 §2.1) makes the keys and values of all its heads of one latent: `c`,
which `kv_b_proj` expands, and `r`, a rotated part that the keys of all heads share. With `U` and `V` the rows of
`kv_b_proj` that make a head's key and value, [q, s] · [U c, r] = [Uᵀ q, s] · [c, r] and Σ w (V c) = V (Σ w c). So, once
U and V are absorbed into queries and outputs, all heads share one key/value head: its key is the latent, its value `c`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata, AttentionOptions
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.layers.latent_chunks import LatentSplit, expand_head_chunks, split_sequences
from ulysses_infer.parallel.layout import Place

FEW_ROWS = 32  # fewer are transposed themselves, not the weight, which torch would lay out anew on a CPU
WeightReader = Callable[[torch.dtype], torch.Tensor]


class KeyValueExpansion(Protocol):
    """`kv_b_proj`, cut by heads."""

    def reader(self, place: Place) -> WeightReader:
        """What gives the rows that `place` computes, [H * (key + value), latent], in a dtype."""
        ...


class LatentWidths(NamedTuple):
    """Numbers of a latent and of a head."""

    latent: int
    """Of `c`: `kv_lora_rank`."""
    rotary: int
    """Of `r`, and of its part of a query."""
    key: int
    """Of a head's key without `r`."""
    value: int

    @classmethod
    def of(cls, module: Any) -> LatentWidths:
        """Of an attention module, by the names that transformers' modules of this kind share. Raises AttributeError."""
        return cls(module.kv_lora_rank, module.qk_rope_head_dim, module.qk_nope_head_dim, module.v_head_dim)

    @property
    def cached(self) -> int:
        """Numbers a token and layer in the cache."""
        return self.latent + self.rotary

    def prefers_expansion(self, length: int, context: int) -> bool:
        """Whether the last `length` of `context` tokens take fewer multiplications with keys and values of their heads.

        Expanding the tokens before them once is then less than what every pair of tokens costs more over latents.
        """
        if length == 1:
            return False
        expanding = (context - length) * self.latent * (self.key + self.value)
        pairs = length * (context - length) + length * (length + 1) // 2
        return expanding < pairs * (2 * self.latent - self.key - self.value)

    def absorb(self, query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """query: [T, H, key + rotary]; weight: [H, key + value, latent]; returns [T, H, latent + rotary]."""
        plain, rotated = query.split((self.key, self.rotary), dim=-1)
        moved = torch.bmm(plain.transpose(0, 1), weight[:, : self.key])
        return torch.cat((moved.transpose(0, 1), rotated), dim=-1)

    def release(self, output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """output: [T, H, latent]; weight: [H, key + value, latent]; returns [T, H, value]."""
        values = weight[:, self.key :]
        if output.shape[0] < FEW_ROWS:
            return torch.bmm(values, output.permute(1, 2, 0)).permute(2, 0, 1)
        return torch.bmm(output.transpose(0, 1), values.transpose(1, 2)).transpose(0, 1)

    def expand(self, latents: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """latents: [n, latent + rotary]; weight: [H, key + value, latent].

        Returns keys [n, H, key + rotary] and values [n, H, value].
        """
        made = (latents[:, : self.latent] @ weight.flatten(0, 1).t()).unflatten(1, weight.shape[:2])
        rotated = latents[:, None, self.latent :].expand(-1, weight.shape[0], -1)
        return torch.cat((made[..., : self.key], rotated), dim=-1), made[..., self.key :].contiguous()


class LatentAttention:
    """How the heads of one layer that a rank computes attend over latents. `join` takes the place of `expand_kv`."""

    def __init__(self, widths: LatentWidths, projection: KeyValueExpansion, own: Place) -> None:
        """`own`: the rank's own heads alone, as attention has them in every mode."""
        self.widths = widths
        self._projection, self._own = projection, own
        self._read: WeightReader = projection.reader(own)
        self._joined: tuple[torch.Tensor, torch.Tensor] | None = None

    def bind(self, place: Place) -> None:
        """Take the views of the weight anew: they are the same in every mode, but it may have moved."""
        self._read = self._projection.reader(self._own)

    def join(self, plain: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """plain: [1, 1, t, latent]; rotated: [1, 1, t, rotary]; returns a key, the latent, and a value, its `c`."""
        latents = torch.cat((plain, rotated), dim=-1)
        self._joined = latents, latents[..., : self.widths.latent]
        return self._joined

    def check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise `UnsupportedModelError` unless attention is given what `join` returned, as it was."""
        joined, self._joined = self._joined, None
        if joined is None or key is not joined[0] or value is not joined[1]:
            raise UnsupportedModelError("it changes keys or values after expand_kv; set cache.latent to false")

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

        Returns [T, H, value]. Long chunks attend to keys and values that are expanded for the step, all others to the
        latents themselves.
        """
        weight = self._read(query.dtype).unflatten(0, (-1, self.widths.key + self.widths.value))
        if options.sliding_window is None and options.chunk_size is None:
            parts = split_sequences(metadata, keys.shape[1], self.widths.prefers_expansion)
        else:
            parts = LatentSplit()  # what lies before a window need not be in the cache any more
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
        return self.widths.release(backend.attend(absorbed, keys, values, metadata, options), weight)
