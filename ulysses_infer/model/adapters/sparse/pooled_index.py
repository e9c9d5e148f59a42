"""Families whose index selects pools of tokens: Qwen4-Exp and GLM-5-Next."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ulysses_infer.attention.index import Selection
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters.base import Adapted, replace_all
from ulysses_infer.model.adapters.rotary import rotate_halves
from ulysses_infer.model.layers.pooled_keys import select_pools


class QwenIndex(Adapted):
    """Qwen4-Exp: a pool's key is the normed mean of projected keys, rotated to the position of the first token."""

    layer_idx: int

    def __init__(self, source: Any, rotary: nn.Module) -> None:
        super().__init__(source)
        self._rotary = [rotary]  # in a list, so that it is not registered as a child
        self.pool, self.top_k, self.cached_width = source.compress_ratio, source.block_topk, source.index_head_dim

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], *_: Any
    ) -> Selection:
        """hidden_states: [1, t, D]; position_embeddings: cosines and sines, each [1, t, rotary width]."""
        projected = self.index_qk_proj(hidden_states[0]).unflatten(-1, (-1, self.index_head_dim))
        query, parts = projected.split((self.index_n_heads, 1), dim=1)
        heads = rotate_halves(self.q_layernorm(query).transpose(0, 1)[None], *position_embeddings)
        return select_pools(self, heads[0].transpose(0, 1), query.new_ones(query.shape[:2]), parts[:, 0])

    def pool_keys(self, parts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """See `PoolingIndex`."""
        keys = self.k_layernorm(parts.float().mean(dim=1).to(parts.dtype))
        return rotate_halves(keys[None, None], *self._rotary[0](keys, starts[None, None].expand(3, 1, -1)))[0, 0]


class GlmIndex(Adapted):
    """GLM-5-Next: a pool's key is a mean of projected keys, whose weights are learned gates, for each element."""

    layer_idx: int

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.pool, self.top_k = source.index_kpool, source.index_topk // source.index_kpool
        self.cached_width = 2 * source.head_dim
        if not source.index_kpool_always_select_tail:
            raise UnsupportedModelError(
                "index_kpool_always_select_tail is false: the first tokens of a text attend to nothing"
            )

    def forward(self, hidden_states: torch.Tensor, q_resid: torch.Tensor, **_: Any) -> Selection:
        """hidden_states: [1, t, D]; q_resid: [1, t, query latent]."""
        hidden = hidden_states[0]
        query = self.wq_b(q_resid[0]).unflatten(-1, (-1, self.head_dim))
        parts = torch.cat((self.k_norm(self.wk(hidden)), F.linear(hidden, self.index_kpool_compress_gate)), dim=-1)
        weights = self.weights_proj(hidden.to(self.weights_proj.weight.dtype)).float()
        return select_pools(self, query, weights * (self.n_heads**-0.5 * self.softmax_scale), parts)

    def pool_keys(self, parts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """See `PoolingIndex`."""
        keys, gates = parts.chunk(2, dim=-1)
        shares = (gates.float() + self.index_kpool_compress_ape.float()).softmax(dim=1)
        return (shares.to(keys.dtype) * keys).sum(dim=1)


def adapt_qwen4_exp(model: nn.Module) -> None:
    """Let pools be selected where their keys are cached."""
    kind = "Qwen4ExpTextRotaryEmbedding"
    rotary = next(module for module in model.modules() if type(module).__name__ == kind)
    replace_all(model, "Qwen4ExpTextQSAIndexer", lambda source: QwenIndex(source, rotary))


def adapt_glm5_next(model: nn.Module) -> None:
    """The same, and no masks, which mark padding."""
    replace_all(model, "Glm5NextTextIndexer", GlmIndex)
    for module in model.modules():
        if hasattr(module, "build_attention_mask_from_topk"):
            cast(Any, module).build_attention_mask_from_topk = _selection  # the instance attribute overrides the method
    model.register_forward_pre_hook(_without_masks, with_kwargs=True)


def _selection(topk_indices: Selection, **_: Any) -> Selection:
    return topk_indices


def _without_masks(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    masks = dict.fromkeys(("indexed_attention", "linear_attention"))
    return args, {**kwargs, "attention_mask": masks}
