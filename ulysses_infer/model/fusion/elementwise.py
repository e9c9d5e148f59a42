"""Fused elementwise operations: norms, rotary embedding, gated activations."""

from __future__ import annotations

from typing import Protocol

import torch

from ulysses_infer.kernels.launch import runs_kernels
from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows
from ulysses_infer.model.fusion.torch_elementwise import TorchElementwise
from ulysses_infer.native.function import ELEMENTWISE, NativeFunction
from ulysses_infer.native.library import is_available, open_library

SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
ACTIVATIONS = ("silu", "gelu_tanh")


class Elementwise(Protocol):
    """Interface of the implementations. All tensors have one dtype; each operation rounds as transformers does."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [..., D]; weight: [D]; returns [..., D]."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int = NONE
    ) -> tuple[torch.Tensor, torch.Tensor | QuantisedRows]:
        """`residual + x` and its norm, all [..., D]. May overwrite `residual` with the sum.

        `kind` (kernels/scaled_rows.py): how the reader of the norm quantises it; it may be returned quantised so.
        """
        ...

    def apply_rotary(
        self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary position embedding. query: [t, Hq, d]; key: [t, Hkv, d]; cosine, sine: [t, r], r <= d, rotates the
        two halves of the first r elements. May overwrite query and key."""
        ...

    def gated(self, activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """`activation(gate) * up`, all [..., F]; `activation` is one of `ACTIVATIONS`."""
        ...

    def gated_shards(
        self, activation: str, gate: torch.Tensor, up: torch.Tensor, kind: int = NONE
    ) -> torch.Tensor | QuantisedRows:
        """`gated` of [t, shards, F], with dense rows: [t, shards * F]. `kind`: see `add_rms_norm`."""
        ...

    def rotary(
        self, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of positions [t] int64 times frequencies [r / 2] float32, times `scaling`: each [t, r]."""
        ...

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """token_ids: [t] int64; table: [V, D]; returns [t, D]."""
        ...


def make_elementwise(dtype: torch.dtype, device: torch.device) -> Elementwise:
    """The fastest implementation available for tensors of `dtype` on `device`."""
    if runs_kernels(device):
        from ulysses_infer.model.fusion.triton_elementwise import TritonElementwise

        return TritonElementwise(dtype, device)
    if device.type == "cpu" and dtype in SUFFIXES and is_available("elementwise"):
        return NativeElementwise(dtype)
    return TorchElementwise(dtype)


class NativeElementwise:
    """Implementation in C (native/elementwise.c): one pass over memory per operation."""

    def __init__(self, dtype: torch.dtype) -> None:
        library, suffix = open_library("elementwise"), SUFFIXES[dtype]
        self.dtype = dtype
        self._rms_norm = NativeFunction(library, f"rms_norm_{suffix}", "pppiiff", ELEMENTWISE)
        self._add_rms_norm = NativeFunction(library, f"add_rms_norm_{suffix}", "ppppiiff", ELEMENTWISE)
        self._rotate = NativeFunction(library, f"rotate_{suffix}", "piipiiippii", ELEMENTWISE)
        self._rotary = NativeFunction(library, f"rotary_angles_{suffix}", "ppppiif", ELEMENTWISE)
        self._take_rows = NativeFunction(library, "take_rows", "pppii", ELEMENTWISE)
        self._gated = {
            name: NativeFunction(library, f"{name}_mul_{suffix}", "ppipiii", ELEMENTWISE) for name in ACTIVATIONS
        }

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        """See `Elementwise`. offset: added to the weight; the product is then in float32."""
        x, width = x.contiguous(), weight.shape[0]
        normed = torch.empty_like(x)
        self._rms_norm(normed.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps, offset)
        return normed

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        kind: int = NONE,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Elementwise`, and `rms_norm` for the offset."""
        x, residual, width = x.contiguous(), residual.contiguous(), weight.shape[0]
        normed, rows = torch.empty_like(x), x.numel() // width
        addresses = (each.data_ptr() for each in (normed, residual, x, weight))
        self._add_rms_norm(*addresses, rows, width, eps, offset)
        return residual, normed

    def apply_rotary(
        self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Elementwise`."""
        query, key = _contiguous_heads(query), _contiguous_heads(key)
        cosine, sine = cosine.contiguous(), sine.contiguous()
        tokens, query_heads, width = query.shape
        self._rotate(
            query.data_ptr(),
            query.stride(0),
            query_heads,
            key.data_ptr(),
            key.stride(0),
            key.shape[1],
            width,
            cosine.data_ptr(),
            sine.data_ptr(),
            tokens,
            cosine.shape[-1] // 2,
        )
        return query, key

    def gated(self, activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See `Elementwise`."""
        width = gate.shape[-1]
        gate, up = _contiguous_rows(gate), _contiguous_rows(up)
        output = torch.empty(gate.shape, dtype=gate.dtype)
        rows = output.numel() // width
        self._gated[activation](
            output.data_ptr(), gate.data_ptr(), gate.stride(-2), up.data_ptr(), up.stride(-2), rows, width
        )
        return output

    def gated_shards(
        self, activation: str, gate: torch.Tensor, up: torch.Tensor, kind: int = NONE
    ) -> torch.Tensor | QuantisedRows:
        """See `Elementwise`."""
        return self.gated(activation, gate.flatten(1), up.flatten(1))

    def rotary(
        self, positions: torch.Tensor, frequencies: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Elementwise`."""
        rows, half = len(positions), len(frequencies)
        cosine, sine = (torch.empty(rows, 2 * half, dtype=self.dtype) for _ in range(2))
        self._rotary(
            cosine.data_ptr(), sine.data_ptr(), positions.data_ptr(), frequencies.data_ptr(), rows, half, scaling
        )
        return cosine, sine

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """See `Elementwise`. Embeddings are replicated, so the table is contiguous."""
        output = table.new_empty(len(token_ids), table.shape[1])
        self._take_rows(output.data_ptr(), table.data_ptr(), token_ids.data_ptr(), len(token_ids), output[0].nbytes)
        return output


def _contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    """x: [t, H, d], copied unless the heads of each token are contiguous."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x: [1, t, F] or [t, F], copied unless each row is contiguous and the row stride is constant."""
    return x if x.stride(-1) == 1 and x.shape[:-1].numel() == x.shape[-2] else x.contiguous()
