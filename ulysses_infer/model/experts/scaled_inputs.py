"""Experts of llama4, whose router scales the inputs.

Rows of unchosen experts are zero there, and stay zero. So only the chosen ones are computed here, by the same function
and with the same placements as everybody's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.model.context import step_context
from ulysses_infer.model.experts.layer import partial_experts


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
        chosen_scores, chosen = scores.topk(self.top_k, dim=-1)
        sum_over_tp = step_context().collectives.sum_over_tp
        total = partial = self._shared_partial(tokens)
        for choice in range(self.top_k):
            scaled = tokens * chosen_scores[:, choice, None]
            routed = partial_experts(self.experts, scaled, chosen[:, choice, None], None)
            total = routed if total is None else total + routed
        assert total is not None
        summed = sum_over_tp(total)
        return (summed if partial is not None else self.shared_expert(tokens) + summed), logits

    def _shared_partial(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The shared expert's part of a sum over the TP group, so that there is one sum. None: it has to sum itself.

        Its parts are those of transformers; fused, it takes `unsummed`.
        """
        shared: Any = self.shared_expert
        partial: torch.Tensor
        if getattr(shared, "can_defer_sum", False):
            partial = shared(tokens, unsummed=True)
        elif step_context().collectives.tp_group is None:
            partial = shared(tokens)
        elif not getattr(shared.down_proj, "has_partial", False):
            return None
        else:
            active = shared.activation_fn(shared.gate_proj(tokens)) * shared.up_proj(tokens)
            partial = shared.down_proj.partial(active)
        return partial
