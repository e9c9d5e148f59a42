"""Fused mixtures of experts on a GPU: the router, the experts and a shared expert in few launches and one sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.model.context import step_context
from ulysses_infer.model.experts import ScaledInputExperts
from ulysses_infer.model.experts.products import SharedTokens
from ulysses_infer.model.fusion.experts import FusedRouter
from ulysses_infer.model.fusion.feed_forward import FusedFeedForward
from ulysses_infer.model.fusion.projections import children_with_weights, has_own_weights


class FusedMixture(nn.Module):
    """The sum over the experts of a token, plus a shared expert if there is one.

    `returns_logits`: whether it returns the router's logits, too.
    """

    def __init__(self, source: nn.Module, returns_logits: bool) -> None:
        super().__init__()
        self.returns_logits = returns_logits
        self.scales = isinstance(source, ScaledInputExperts)
        for name, child in source.named_children():
            self.add_module(name, child)
        router, experts, shared = _parts(source)
        # In lists, so that each is registered once, under its own name.
        self._router = [router if isinstance(router, FusedRouter) else FusedRouter(router, "sigmoid")]
        self._experts, self._shared = [experts], shared

    @staticmethod
    def candidate(source: nn.Module) -> bool:
        """Whether `source` has the weights of such a block and no others."""
        router, experts, shared = _parts(source)
        known = {router, experts, *shared}
        if router is None or experts is None or set(children_with_weights(source).values()) != known:
            return False
        scales_one = isinstance(source, ScaledInputExperts) and source.top_k == 1 and FusedRouter.candidate(router)
        return (isinstance(router, FusedRouter) or scales_one) and not has_own_weights(source)

    @property
    def can_defer_sum(self) -> bool:
        """Whether it can leave the sum over the TP group to the caller."""
        return all(shared.can_defer_sum for shared in self._shared)

    def forward(self, hidden_states: torch.Tensor, unsummed: bool = False) -> Any:
        """hidden_states: [..., D]; returns the same shape. unsummed: leave the sum over the TP group out."""
        context, tokens = step_context(), hidden_states.flatten(0, -2)
        own = tokens[: context.num_local_tokens]  # an empty slice runs a dummy token
        (experts,), (router,) = self._experts, self._router
        routed, logits = router.route(own, self.scales, experts.expert_layer.exchanges(context))
        shared = SharedTokens(own, self._shared[0]) if self._shared else None
        output = experts.expert_layer.forward(routed, context, shared)
        output = output if len(own) == len(tokens) else torch.zeros_like(tokens)
        if not unsummed:
            output = context.collectives.sum_over_tp(output)
        output = output if self.scales else output.view(hidden_states.shape)
        return (output, logits) if self.returns_logits else output


def _parts(source: nn.Module) -> tuple[Any, Any, list[Any]]:
    """Router, experts, and the shared expert, if there is one that can be part of the sum."""
    router: Any = None
    experts: Any = None
    shared: list[Any] = []
    for name, child in source.named_children():
        if hasattr(child, "expert_layer"):
            experts = child
        elif isinstance(child, FusedRouter) or name == "router":
            router = child
        elif isinstance(child, FusedFeedForward) and child.can_defer_sum and not shared:
            shared = [child]
    return router, experts, shared
