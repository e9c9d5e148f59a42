"""Elementwise operations of a GPU: one Triton kernel each (`kernels/`), with the quantisation of the results."""

from __future__ import annotations

import torch

from ulysses_infer.kernels import activation, norm
from ulysses_infer.kernels.launch import has_fp8
from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows
from ulysses_infer.model.fusion.torch_elementwise import TorchElementwise


class TritonElementwise(TorchElementwise):
    """See `Elementwise`. Rotary angles and the embedding are computed once per step, by torch."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype)
        self._has_fp8 = has_fp8(device)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Elementwise`."""
        normed = norm.rms_norm(x, weight, eps)
        assert isinstance(normed, torch.Tensor)
        return normed

    def add_rms_norm(  # type: ignore[override]  # torch's does not quantise
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int = NONE
    ) -> tuple[torch.Tensor, torch.Tensor | QuantisedRows]:
        """See `Elementwise`."""
        residual = residual.contiguous()
        return residual, norm.rms_norm(x, weight, eps, residual, self._supported(kind))

    def gated(self, name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See `Elementwise`."""
        gate, up = (x.reshape(-1, 1, x.shape[-1]) for x in (gate, up))
        output = activation.gated(name, gate, up)
        assert isinstance(output, torch.Tensor)
        return output.view(*gate.shape[:-1], -1)

    def gated_shards(
        self, name: str, gate: torch.Tensor, up: torch.Tensor, kind: int = NONE
    ) -> torch.Tensor | QuantisedRows:
        """See `Elementwise`."""
        return activation.gated(name, gate, up, self._supported(kind))

    def _supported(self, kind: int) -> int:
        return kind if self._has_fp8 else NONE
