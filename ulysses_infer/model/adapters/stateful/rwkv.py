"""RWKV: each block mixes a token with the one before it, ahead of its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.cache.states import StateShape
from ulysses_infer.model.adapters.base import Adapted
from ulysses_infer.model.context import step_context
from ulysses_infer.model.injection.rules import MLP_RULES
from ulysses_infer.model.recurrent.history import History, KeepsStates

TIME, CHANNELS = 0, 1  # numbers of the states


class _Piece(nn.Module):
    """One of three inputs that lie side by side."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [..., 3 * D]; returns [..., D]."""
        return hidden_states.chunk(3, dim=-1)[self.number]


class RwkvBlock(Adapted, KeepsStates):
    """Mixes tokens before attention, whose recurrence each rank runs for its own channels, and before feed-forward.

    scale: transformers divides the weights of both outputs by it, and hidden states between blocks.
    """

    def __init__(self, source: Any, scale: float) -> None:
        super().__init__(source)
        self.scale, self.dtype = scale, self.ln1.weight.dtype
        self.histories = [History(self.layer_id, index, 1, is_sliced=True) for index in (TIME, CHANNELS)]
        self.attention.layer_idx = self.layer_id
        for number, name in enumerate(("key", "value", "receptance")):
            setattr(self.attention, f"input_of_{name}", _Piece(number))
        self.feed_forward.feed_forward_rules = {"key": MLP_RULES["up_proj"], "value": MLP_RULES["down_proj"]}

    def own_states(self) -> tuple[StateShape, ...]:
        """All channels of the inputs of attention and feed-forward."""
        return tuple(history.shape(self.ln1.weight.shape[0], self.dtype) for history in self.histories)

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None, None]:
        """hidden: [1, t, D]; returns the same shape, without states and attention."""
        if self.layer_id == 0:
            hidden = self.pre_ln(hidden)
        hidden = hidden + self._attended(self.ln1(hidden)) * self.scale
        return hidden + self._fed_forward(self.ln2(hidden)) * self.scale, None, None

    def _attended(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, t, D]; returns the same shape."""
        mixes = [getattr(self.attention, f"time_mix_{name}") for name in ("key", "value", "receptance")]
        output: torch.Tensor = self.attention(torch.cat(self._mixed(TIME, hidden, mixes), dim=-1))[0]
        return output

    def _fed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, t, D]; returns the same shape."""
        block = self.feed_forward
        key, receptance = self._mixed(CHANNELS, hidden, [block.time_mix_key, block.time_mix_receptance])
        output: torch.Tensor = block.value(torch.square(torch.relu(block.key(key))))
        return torch.sigmoid(block.receptance(receptance)) * output

    def _mixed(self, which: int, hidden: torch.Tensor, mixes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each token mixed with the one before it, for each of `mixes` [1, 1, D]. hidden: [1, t, D]."""
        own = hidden[0, : step_context().num_local_tokens]
        (before,) = self.histories[which].before(own)
        if not len(own):  # an empty slice runs a dummy token, whose output is unused
            before = torch.zeros_like(hidden[0])
        return [hidden * mix + before * (1 - mix) for mix in mixes]


def adapt_rwkv(model: Any) -> None:
    """Replace the blocks. Weights are not rescaled in place: files may share them, and updates would undo it."""
    base, every = model.rwkv, model.config.rescale_every
    base.layers_are_rescaled = True
    for number, block in enumerate(base.blocks):
        base.blocks[number] = RwkvBlock(block, 0.5 ** (number // every) if every > 0 else 1.0)
