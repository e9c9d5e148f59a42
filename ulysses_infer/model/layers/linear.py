"""`ShiftLinear`: a linear layer that stores one slice of its weight and views it differently in each mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ulysses_infer.kernels.scaled_rows import NONE
from ulysses_infer.model.context import step_context
from ulysses_infer.model.layers.matmul import linear, linears
from ulysses_infer.native.matmul import Weights
from ulysses_infer.parallel.layout import Mode, Place, Span
from ulysses_infer.parallel.sharding import Sharding, merge

Cut = Literal["column", "row"]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a plain linear layer, gpt2's `Conv1D`, which stores the weight transposed, or deepseek_v4's
    projection of groups of heads.

    Other subclasses are not: they may do more than multiply (llama4's router).
    """
    return type(module) is nn.Linear or type(module).__name__ in ("Conv1D", "DeepseekV4GroupedLinear")


def cut_features(linear: nn.Module, cut: Cut) -> int:
    """The number of features along the cut: outputs for column-parallel, inputs for row-parallel."""
    outputs, inputs = features_of(linear)
    return outputs if cut == "column" else inputs


def features_of(linear: nn.Module) -> tuple[int, int]:
    """(output features, input features) of a linear layer or a `Conv1D`."""
    outputs, inputs = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.shape[::-1]  # type: ignore
    return outputs, inputs


class ShiftLinear(nn.Module):
    """A linear layer that stores its base slice once and gives every mode zero-copy views of it.

    `column`: shards the output features (rows of the weight), `[t, in] -> [t, out / tp]`. `row`: shards the input
    features, `[t, in / tp] -> [t, out]`, summed over the TP group; its bias is added once, after the sum. The paper
    stores a second copy of the weights for its second mode (§3.2); this does not.
    """

    def __init__(self, source: Any, cut: Cut, sharding: Sharding, base: Place) -> None:
        super().__init__()
        self.cut, self.sharding, self.base = cut, sharding, base
        self.transposed = not isinstance(source, nn.Linear)  # the weight is [in, out], as in the checkpoint
        outputs, inputs = features_of(source)
        stored = sum(span.size for span in sharding.base_spans(base))
        shape = (stored, inputs) if cut == "column" else (outputs, stored)
        self.weight = nn.Parameter(
            source.weight.new_empty(shape[::-1] if self.transposed else shape), requires_grad=False
        )
        bias_size = stored if cut == "column" else outputs
        has_bias = source.bias is not None
        self.bias = nn.Parameter(source.bias.new_empty(bias_size), requires_grad=False) if has_bias else None
        self._pieces: list[Weights] = []
        self._part_sizes: list[int] = []
        self._views: dict[Mode, tuple[list[Weights], list[int]]] = {}
        self.is_stacked = False
        """Whether its weight is part of a stacked weight (`fusion/stacked.py`)."""

    def slices(self, name: str) -> tuple[int, list[Span]] | None:
        """Which part of the full parameter `name` this rank stores: (dimension, spans); None for all of it."""
        if name == "bias" and self.cut == "row":
            return None
        return (self._cut_dimension if name == "weight" else 0), self.sharding.base_spans(self.base)

    @property
    def _cut_dimension(self) -> int:
        """The dimension of the stored weight that is sharded."""
        return int((self.cut == "row") != self.transposed)

    def bind(self, place: Place) -> None:
        """Switch to the view of the weight that `place` needs. Copies nothing."""
        if self.is_stacked:
            self._pieces = []
            return
        if place.mode not in self._views:
            spans = self.sharding.part_spans(self.base, place)
            self._views[place.mode] = [self._piece(span) for span in merge(spans)], [span.size for span in spans]
        self._pieces, self._part_sizes = self._views[place.mode]

    def forget_views(self) -> None:
        """Make the views of every mode again when it is next bound. Call it after the weight has changed address."""
        self._views.clear()

    def _piece(self, span: Span) -> Weights:
        weight = self.weight.detach().narrow(self._cut_dimension, span.start, span.size)
        weight = weight.t() if self.transposed else weight
        if self.cut == "row" or self.bias is None:
            return weight, None
        return weight, self.bias.detach().narrow(0, span.start, span.size)

    def reader(self, place: Place) -> Callable[[torch.dtype], torch.Tensor]:
        """Returns the weight of a column-parallel layer as one piece for `place`, [out / tp, in]: a view, in its own
        dtype."""
        (span,) = self.sharding.local_spans(self.base, place)
        weight, _ = self._piece(span)
        return lambda _: weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: [..., in features of the mode]; returns [..., out features of the mode]."""
        if self.cut == "row":
            return self._forward_row(inputs)
        if len(self._pieces) == 1:
            return linear(inputs, *self._pieces[0])
        return torch.cat([linear(inputs, weight, bias) for weight, bias in self._pieces], dim=-1)

    input_kind = NONE
    """See `QuantizedLinear.input_kind`."""

    def parts(self, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """The result of `forward` of a column-parallel layer, split into the sharding's parts: q, k and v if packed."""
        weights = self.part_weights()
        return linears(inputs, weights) if weights else self.forward(inputs).split(self._part_sizes, dim=-1)

    def part_weights(self) -> Sequence[Weights]:
        """The weight and bias of each of `parts` in the mode; empty if a piece of weight holds several."""
        return self._pieces if len(self._pieces) == len(self._part_sizes) else ()

    def shard_parts(self, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """`parts` as [..., 1, features], as `StackedLinears.shard_parts` returns them."""
        return [part.unsqueeze(-2) for part in self.parts(inputs)]

    def dense_parts(self) -> Sequence[torch.Tensor]:
        """The weights of the sharding's parts in the mode, [1, features, in] each; empty if they have biases."""
        if self.bias is not None or self.transposed or len(self._pieces) != len(self._part_sizes):
            return []
        return [weight[None] for weight, _ in self._pieces]

    def dense_row(self) -> torch.Tensor | None:
        """The weight of a row-parallel layer in the mode, [out, in]; None if its inputs are not dense."""
        ((weight, _),) = self._pieces
        return None if self.transposed else weight

    @property
    def has_partial(self) -> bool:
        """Whether the sum of `partial` over the TP group is the result of `forward`: no bias, no adapter."""
        return self.cut == "row" and self.bias is None and not self._forward_hooks

    def partial(self, inputs: torch.Tensor) -> torch.Tensor:
        """This rank's term of the result of a row-parallel layer, for callers that sum it with more in one kernel."""
        ((weight, _),) = self._pieces
        return linear(inputs, weight)

    def _forward_row(self, inputs: torch.Tensor) -> torch.Tensor:
        output = step_context().collectives.sum_over_tp(self.partial(inputs))
        return output if self.bias is None else output.add_(self.bias)
