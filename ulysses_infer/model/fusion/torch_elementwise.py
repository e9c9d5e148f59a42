"""Elementwise operations in torch, for any device."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows


class TorchElementwise:
    """Implements `Elementwise`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Elementwise`."""
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int = NONE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Elementwise`."""
        total = residual + x
        return total, self.rms_norm(total, weight, eps)

    def apply_rotary(
        self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Elementwise`."""
        return _apply_rotary(query, cosine, sine), _apply_rotary(key, cosine, sine)

    def gated(self, activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See `Elementwise`."""
        active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        return active * up

    def gated_shards(
        self, activation: str, gate: torch.Tensor, up: torch.Tensor, kind: int = NONE
    ) -> torch.Tensor | QuantisedRows:
        """See `Elementwise`."""
        return self.gated(activation, gate.flatten(1), up.flatten(1))

    def rotary(
        self, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Elementwise`."""
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(self.dtype), (angles.sin() * scaling).to(self.dtype)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """See `Elementwise`."""
        return F.embedding(token_ids, table)


def _apply_rotary(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x: [t, H, d]; cosine, sine: [t, r]."""
    width = cosine.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)
