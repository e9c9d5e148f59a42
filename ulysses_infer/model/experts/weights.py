"""The experts that a rank stores of a layer, and the view of each mode."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch.nn import functional as F

from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.kernels.launch import runs_products
from ulysses_infer.model.context import step_context_or_none
from ulysses_infer.model.experts.placement import EXPERT, REPLICATE, WIDTH, check_width
from ulysses_infer.model.experts.products import StoredMixture, mixture_of
from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.model.quantization.grouped import TokenGroups, is_dense_grouped, stored_product
from ulysses_infer.parallel.layout import Layout, Mode, Place, Span, even_span
from ulysses_infer.parallel.sharding import Part, Sharding

Weight = tuple[torch.Tensor, torch.Tensor | None]  # [E, out, in] and its bias [E, out]


class ExpertWeights:
    """The stored part of one experts module and the views of the current mode.

    Weights are kept as transformers has them: up `[E, k * I, H]`, down `[E, H, I]` (`is_transposed`: `[E, H, k * I]`
    and `[E, I, H]`), with k = 2 for gate and up, side by side or interleaved.
    """

    def __init__(self, module: Any, placement: str, layout: Layout, shard: int) -> None:
        self.module, self.placement = module, placement
        self.up_name = "gate_up_proj" if module.has_gate else "up_proj"
        self.num_experts = int(module.down_proj.shape[0])
        width = module.down_proj.shape[1 if module.is_transposed else 2]
        check_width(layout, placement, width)
        self.base = layout.place(_slicing_mode(placement, layout), shard)
        self.up_sharding = Sharding(_up_parts(width, module.has_gate, module.is_concatenated))
        self.down_sharding = Sharding((Part(width),))
        every = Span(0, self.num_experts)
        self.own = even_span(self.num_experts, shard, layout.world_size) if placement == EXPERT else every
        self.gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        """Gate and up, [S, I] each, to [S, I]: faster than `apply_gate` and equal to it (fusion/experts.py)."""
        self.activation: str | None = None
        """The activation of `gate`."""
        self._stored: StoredMixture | None = None
        self._up: list[Weight] = []
        self._down: Weight | None = None

    def slices(self, name: str) -> tuple[int, list[Span]] | None:
        """Which part of the full parameter `name` this rank stores: (dimension, spans); None for all of it."""
        if self.placement == EXPERT:
            return 0, [self.own]
        transposed = bool(self.module.is_transposed)
        if name == self.up_name:
            return (2 if transposed else 1), self.up_sharding.base_spans(self.base)
        if name == f"{self.up_name}_bias":
            return 1, self.up_sharding.base_spans(self.base)
        if name == "down_proj":
            return (1 if transposed else 2), self.down_sharding.base_spans(self.base)
        return None

    def bind(self, place: Place) -> None:
        """Read the weights as `place` needs them from now on. Views only; they only change for `replicate`."""
        place = self._stored_place(place)
        spans = self.up_sharding.local_spans(self.base, place)
        self._up = [(self._view(self.up_name, 1, span), self._bias(f"{self.up_name}_bias", span)) for span in spans]
        (span,) = self.down_sharding.local_spans(self.base, place)
        self._down = self._view("down_proj", 2, span), self._down_bias(place)
        self._stored = None

    def stored(self) -> StoredMixture | None:
        """What one launch of each product reads; None if they take more launches."""
        if self._stored is None and self.activation is not None and not self.module.has_bias:
            gate, up, down = self._matrices()
            self._stored = mixture_of(self.activation, gate, up, down)
        return self._stored

    def _matrices(self) -> tuple[StoredExperts, StoredExperts, StoredExperts]:
        """Gate, up and down."""
        assert self._down is not None
        ups = [weight for weight, _ in self._up]
        gate, up = ups if len(ups) == 2 else ups[0].chunk(2, dim=1)
        return dense_experts(gate), dense_experts(up), dense_experts(self._down[0])

    def _stored_place(self, place: Place) -> Place:
        """Which slice of the experts is read in the mode of `place`."""
        return place if self.placement == REPLICATE else self.base

    def _down_bias(self, place: Place) -> torch.Tensor | None:
        """The bias belongs to the sum over the slices of an expert: the first slice adds it. (Rank-divergent on
        purpose.)"""
        return self._bias("down_proj_bias", None) if place.weight_index == 0 else None

    def _view(self, name: str, dimension: int, span: Span) -> torch.Tensor:
        """[E, out, in]; `dimension` is the sharded one of the untransposed weight."""
        weight: torch.Tensor = getattr(self.module, name).detach()
        weight = weight.transpose(1, 2) if self.module.is_transposed else weight
        return weight.narrow(dimension, span.start, span.size)

    def _bias(self, name: str, span: Span | None) -> torch.Tensor | None:
        if not self.module.has_bias:
            return None
        bias: torch.Tensor = getattr(self.module, name).detach()
        return bias if span is None else bias.narrow(1, span.start, span.size)

    def forward(self, tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """tokens: [S, H] sorted by expert, those of own expert e up to row `offsets[e]`; returns [S, H], this rank's
        part of the sum over the slices of an expert. Rows after the last offset are undefined."""
        assert self._down is not None
        hidden = self._activate([_grouped_linear(tokens, weight, offsets) for weight in self._up])
        return _grouped_linear(hidden, self._down, offsets)

    def _activate(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """pieces: [S, k * I] in one or two; returns [S, I]."""
        if self.gate is not None:
            gate, up = pieces if len(pieces) == 2 else pieces[0].chunk(2, dim=-1)
            return self.gate(gate, up)
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return self.apply_gate(whole)

    def apply_gate(self, up: torch.Tensor) -> torch.Tensor:
        """What the model applies between its two products. up: [S, k * I]; returns [S, I]."""
        hidden: torch.Tensor = self.module._apply_gate(up) if self.module.has_gate else self.module.act_fn(up)
        return hidden


def _slicing_mode(placement: str, layout: Layout) -> Mode:
    """The mode whose weight slices are stored: whole experts are one slice."""
    whole = Mode(layout.world_size, 1)
    return {REPLICATE: layout.base, WIDTH: layout.shift, EXPERT: whole}[placement]


def _up_parts(width: int, has_gate: bool, is_concatenated: bool) -> tuple[Part, ...]:
    if not has_gate:
        return (Part(width),)
    return (Part(width), Part(width)) if is_concatenated else (Part(width, width=2),)


def expert_of_rows(offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The own expert of each row, [num_rows]; the last one for rows after the last offset."""
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True).clamp(max=len(offsets) - 1)


def dense_experts(matrices: torch.Tensor) -> StoredExperts:
    """matrices: [E, out, in], a view with any strides."""
    return StoredExperts(matrices, *matrices.shape[1:])


def _grouped_linear(tokens: torch.Tensor, weight: Weight, offsets: torch.Tensor) -> torch.Tensor:
    matrices, bias = weight
    fits = is_dense_grouped(tokens, matrices)
    if runs_products(tokens.device) and not fits:
        output = stored_product(tokens, TokenGroups(offsets), dense_experts(matrices))
    elif fits or tokens.device.type != "cpu":
        output = F.grouped_mm(tokens, matrices.transpose(1, 2), offs=offsets)
    else:
        return _linear_of_experts(tokens, matrices, bias, offsets)
    return output if bias is None else output + bias[expert_of_rows(offsets, len(tokens))]


def _linear_of_experts(
    tokens: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor
) -> torch.Tensor:
    """On a CPU, where `grouped_mm` is a loop too, with a slow product for few rows."""
    step = step_context_or_none()
    if step is not None and step.matmul is not None:
        output = step.matmul.of_experts(tokens, matrices, bias, offsets)
        if output is not None:
            return output
    ends = offsets.tolist()
    groups = zip(matrices, repeat(None) if bias is None else bias, [0, *ends], ends, strict=False)
    pieces = [linear(tokens[start:end], matrix, own) for matrix, own, start, end in groups if end > start]
    return torch.cat(pieces) if pieces else tokens.new_empty(0, matrices.shape[1])
