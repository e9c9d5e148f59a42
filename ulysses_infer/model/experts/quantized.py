"""The quantized experts that a rank stores of a layer, and the view of each mode."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_infer.model.experts.kinds import dense_weights, expert_shape, matrix_sizes
from ulysses_infer.model.experts.matrix import ExpertMatrix
from ulysses_infer.model.experts.products import StoredMixture, mixture_of
from ulysses_infer.model.experts.weights import ExpertWeights, expert_of_rows
from ulysses_infer.model.layers.linear import Cut
from ulysses_infer.model.quantization.expert_scheme import EXPERTS_MARK, ExpertScheme
from ulysses_infer.model.quantization.grouped import TokenGroups
from ulysses_infer.parallel.layout import Layout, Place
from ulysses_infer.parallel.sharding import Part, Sharding


class QuantizedExpertWeights(ExpertWeights):
    """`ExpertWeights` whose weights are one `ExpertMatrix` each; biases are plain.

    Gate and up are one matrix if the checkpoint has one tensor for both, else two.
    """

    def __init__(self, module: Any, placement: str, layout: Layout, shard: int) -> None:
        super().__init__(module, placement, layout, shard)
        scheme: ExpertScheme = getattr(module, EXPERTS_MARK)
        shape, device = expert_shape(module), module.down_proj.device
        for name in dense_weights(module):
            delattr(module, name)
        for name, of_matrix in scheme.schemes.items():
            sharding = self.up_sharding if name == "gate_up_proj" else Sharding((Part(shape.width),))
            cut: Cut = "row" if name == "down_proj" else "column"
            sizes = matrix_sizes(name, shape)
            matrix = ExpertMatrix(of_matrix, sizes, cut, sharding, shape.num_experts, self.own, self.base, device)
            matrix.is_transposed = module.is_transposed
            module.add_module(name, matrix)
        self._ups: list[ExpertMatrix] = [getattr(module, name) for name in scheme.schemes if name != "down_proj"]
        self._biases: tuple[torch.Tensor | None, torch.Tensor | None] = None, None

    def bind(self, place: Place) -> None:
        """Read the weights as `place` needs them from now on. Views only."""
        place = self._stored_place(place)
        for matrix in (*self._ups, self.module.down_proj):
            matrix.bind(place)
        self._biases = self._up_bias(place), self._down_bias(place)
        self._stored = None

    def stored(self) -> StoredMixture | None:
        """See `ExpertWeights.stored`."""
        if self._stored is None and self.activation is not None and not self.module.has_bias:
            ups = [stored for matrix in self._ups for stored in matrix.stored_parts()]
            downs = self.module.down_proj.stored_parts()
            if len(ups) == 2 and len(downs) == 1:
                self._stored = mixture_of(self.activation, *ups, *downs)
        return self._stored

    def _up_bias(self, place: Place) -> torch.Tensor | None:
        if not self.module.has_bias:
            return None
        bias: torch.Tensor = getattr(self.module, f"{self.up_name}_bias").detach()
        parts = [bias.narrow(1, span.start, span.size) for span in self.up_sharding.local_spans(self.base, place)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def forward(self, tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """See `ExpertWeights.forward`."""
        groups, (up_bias, down_bias) = TokenGroups(offsets), self._biases
        experts = expert_of_rows(offsets, len(tokens)) if self.module.has_bias else offsets
        pieces = [matrix(tokens, groups) for matrix in self._ups]
        if up_bias is not None:
            pieces = [self._joined(pieces) + up_bias[experts]]
        elif not self.module.is_concatenated:
            pieces = [self._joined(pieces)]
        output: torch.Tensor = self.module.down_proj(self._activate(pieces), groups)
        return output if down_bias is None else output + down_bias[experts]

    def _joined(self, ups: list[torch.Tensor]) -> torch.Tensor:
        """Gate and up in the order that the module's gate expects."""
        if len(ups) == 1:
            return ups[0]
        return torch.cat(ups, dim=-1) if self.module.is_concatenated else torch.stack(ups, dim=-1).flatten(-2)
