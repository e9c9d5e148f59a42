"""XGLM: attention computed in the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all


class XglmAttention(AdaptedAttention):
    """Separate q, k and v, as in most models."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; returns ([1, t, D], None)."""
        heads = (self.heads(each(hidden_states)) for each in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend(*heads, scaling=self.scaling)), None


def adapt_xglm(model: nn.Module) -> None:
    """Replace the attention modules."""
    replace_all(model, "XGLMAttention", XglmAttention)
