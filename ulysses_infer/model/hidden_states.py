"""The hidden states of a step that a head for drafting reads, in memory that recorded steps write to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class HiddenStates:
    """Keeps, for the tokens of a rank's slice, what some layers read, or what the vocabulary head reads."""

    def __init__(
        self, layers: Sequence[int], num_rows: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """layers: whose inputs to keep, one after another; none: what the vocabulary head reads. num_rows: the most
        tokens of a slice, with padding; width: of a hidden state."""
        self.layers, self._width = tuple(layers), width
        self._rows = torch.zeros(num_rows, max(1, len(self.layers)) * width, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory."""
        return self._rows.numel() * self._rows.element_size()

    def of_slice(self, count: int) -> torch.Tensor:
        """Those of the last step's first `count` tokens of this rank, [count, F], until the next step."""
        return self._rows[:count]

    def keep_input(self, layer: int, hidden: torch.Tensor) -> None:
        """hidden: [1, t, D], the input of `layer`; kept if it is one of `layers`."""
        for place, wanted in enumerate(self.layers):
            if wanted == layer:
                self._keep(place, hidden[0])

    def keep_output(self, hidden: torch.Tensor) -> None:
        """hidden: [t, D], what the vocabulary head reads; kept if `layers` is empty."""
        if not self.layers:
            self._keep(0, hidden)

    def _keep(self, place: int, hidden: torch.Tensor) -> None:
        self._rows[: len(hidden), place * self._width : (place + 1) * self._width].copy_(hidden)

    def watch(self, base: nn.Module) -> None:
        """Keep what passes through `base`, a transformers model without its head, whenever it runs."""
        layers: Any = base.layers

        def before(layer: int, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.keep_input(layer, given[0] if given else named["hidden_states"])

        for layer in set(self.layers):
            layers[layer].register_forward_pre_hook(
                lambda _, given, named, layer=layer: before(layer, given, named), with_kwargs=True
            )
        if not self.layers:
            base.register_forward_hook(lambda _, __, output: self.keep_output(output[0][0]))
