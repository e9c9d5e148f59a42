"""Experts of llama4, whose router scales the inputs.

Rows of unchosen experts are zero there, and stay zero. So only the chosen ones are computed here, by the same function
and with the same placements as everybody's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.model.experts.layer import shift_experts


class ScaledInputExperts(nn.Module):
    """Replaces `Llama4TextMoe`, with its router, experts and shared expert under the same names."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.top_k = int(source.top_k)
        self.router, self.experts, self.shared_expert = source.router, source.experts, source.shared_expert
        self.experts.is_transposed, self.experts.is_concatenated = True, True
        self.experts.has_gate, self.experts.has_bias = True, False
        self.experts._apply_gate = self._apply_gate

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [S, 2 * I]; returns [S, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        activated: torch.Tensor = up * self.experts.act_fn(gate)
        return activated

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states: [1, t, D] or [t, D]; returns ([t, D], router logits [t, E])."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(tokens)
        shared = self.shared_expert(tokens)
        chosen_scores, chosen = scores.topk(self.top_k, dim=-1)
        for choice in range(self.top_k):
            scaled = tokens * chosen_scores[:, choice, None]
            once = torch.ones_like(chosen_scores[:, :1])
            shared = shared + shift_experts(self.experts, scaled, chosen[:, choice, None], once)
        return shared, logits
