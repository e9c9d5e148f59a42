"""The experts of one layer in any mode: the function that transformers' models call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ulysses_infer.kernels.launch import runs_products
from ulysses_infer.model.context import StepContext, step_context, step_context_or_none
from ulysses_infer.model.experts.placement import EXPERT, REPLICATE
from ulysses_infer.model.experts.products import MOST_ROWS, SharedTokens
from ulysses_infer.model.experts.quantized import QuantizedExpertWeights
from ulysses_infer.model.experts.routed import Routed
from ulysses_infer.model.experts.weights import ExpertWeights
from ulysses_infer.model.quantization.expert_scheme import EXPERTS_MARK
from ulysses_infer.native.library import is_available
from ulysses_infer.native.sorted_rows import SortedRows
from ulysses_infer.parallel.experts import dispatch, dispatch_pays, gather_tokens, return_parts
from ulysses_infer.parallel.layout import Layout, Place

EXPERTS_NAME = "ulysses_infer"


class ExpertLayer:
    """The experts of one layer on one rank: stored weights, owners, and token counts."""

    def __init__(self, module: nn.Module, placement: str, layout: Layout, shard: int) -> None:
        kind = QuantizedExpertWeights if hasattr(module, EXPERTS_MARK) else ExpertWeights
        self.weights = kind(module, placement, layout, shard)
        self.placement, self.first_member = placement, 0
        self._world_size = layout.world_size
        self._num_tokens: torch.Tensor | None = None  # [own experts] int64, on the device

    def slices(self, name: str) -> Any:
        """See `ExpertWeights.slices`."""
        return self.weights.slices(name)

    def bind(self, place: Place) -> None:
        """Compute as `place` needs from now on."""
        self.weights.bind(place)
        self.first_member = place.weight_index * place.mode.sp

    def exchanges(self, context: StepContext) -> bool:
        """Whether tokens travel to the ranks of their experts."""
        return self.placement != REPLICATE and context.collectives.place.mode.sp > 1

    def forward(self, routed: Routed, context: StepContext, shared: SharedTokens | None = None) -> torch.Tensor:
        """The sum over the experts that the SP group of this rank holds, for its own tokens: [t, H].

        shared: added, too.
        """
        if not self.exchanges(context):
            return self.compute(routed, shared)
        tokens, packed = context.token_spans, routed.pack()
        row_bytes = packed.shape[1] * packed.element_size()
        sizes = tokens[-1].stop, self.num_experts, routed.experts.shape[1], row_bytes
        if self.placement == EXPERT and not context.is_captured and dispatch_pays(context.collectives, *sizes):
            members = self._members(routed.experts)
            output = dispatch(context.collectives, packed, members, lambda rows: self.compute(routed.unpack(rows)))
            return output if shared is None else output + shared.compute()
        arrived = routed.unpack(gather_tokens(context.collectives, packed, tokens))
        partial, added = self._apart(arrived, shared)
        return _sum_of_parts(return_parts(context.collectives, partial, tokens), added)

    def _members(self, experts: torch.Tensor) -> torch.Tensor:
        """Like `experts`, with the SP group member that owns each; outside of 0 .. sp - 1 for other groups' experts."""
        owners = ((experts + 1) * self._world_size - 1) // self.num_experts  # the inverse of `even_span`
        return owners - self.first_member

    def compute(self, routed: Routed, shared: SharedTokens | None = None) -> torch.Tensor:
        """Own experts on the tokens that chose them: [n, H], zero for tokens that chose none; plus `shared`."""
        routing = _routing_on(routed.hidden)
        if routing is not None and routed.weights is not None:
            found = self._sorted(routed, routing)
            output, added = self._rows(routed, found, shared, routing)
            return self._sum_of_experts(output, routed, found, added, routing)
        output, added = self._apart(routed, shared)
        return output if added is None else _sum_of_parts(output[:, None], added)

    def _apart(self, routed: Routed, shared: SharedTokens | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`compute` of the experts, [n, H], and of `shared`, which may be of other tokens."""
        routing = _routing_on(routed.hidden)
        if routing is None:
            return self._compute_by_torch(routed), None if shared is None else shared.compute()
        found = self._sorted(routed, routing)
        output, added = self._rows(routed, found, shared, routing)
        scattered = routed.weights is None and self._is_small(routed)
        return output if scattered else self._sum_of_experts(output, routed, found, None, routing), added

    def _sorted(self, routed: Routed, routing: Any) -> SortedRows:
        counts = self._counts(routed.experts.device)
        found: SortedRows = routing.sort_by_expert(routed.experts, self.weights.own.start, counts)
        return found

    def _is_small(self, routed: Routed) -> bool:
        """Whether both products are one launch each."""
        if not runs_products(routed.hidden.device):
            return False
        rows_of_each = routed.experts.numel() / max(1, self.num_experts)
        return rows_of_each <= MOST_ROWS and self.weights.own.size > 0 and self.weights.stored() is not None

    def _rows(
        self, routed: Routed, found: SortedRows, shared: SharedTokens | None, routing: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The results of own experts, and of `shared`. Nothing is read on the host.

        The results are by row; in a small step of inputs that are scaled, by token.
        """
        mixture = self.weights.stored() if self._is_small(routed) else None
        if mixture is not None:
            return mixture.products(routed.hidden, found, self.num_experts, routed.weights is None, shared)
        added = None if shared is None else shared.compute()
        if self.weights.own.size == 0:
            return routed.hidden.new_zeros(len(found.tokens), routed.hidden.shape[1]), added
        return self.weights.forward(routing.take_rows(routed.hidden, found), found.ends), added

    def _sum_of_experts(
        self, output: torch.Tensor, routed: Routed, found: SortedRows, added: torch.Tensor | None, routing: Any
    ) -> torch.Tensor:
        """output: by row; returns the sum of each token's, [n, H]."""
        total: torch.Tensor = routing.sum_of_experts(output, routed.weights, found.rows, added, routed.weights_dtype)
        return total

    def _compute_by_torch(self, routed: Routed) -> torch.Tensor:
        own, choices = self.weights.own.size, routed.experts.shape[1]
        experts, order = self._own_index(routed.experts.long()).sort()
        counts = experts.new_zeros(own + 1).scatter_add_(0, experts, torch.ones_like(experts))[:own]
        self._counts(counts.device).add_(counts)
        host_knows = experts.device.type == "cpu"  # else it would have to wait
        num_rows = int(counts.sum()) if host_knows else len(order) * bool(own)
        if num_rows == 0:
            return torch.zeros_like(routed.hidden)
        experts, order = experts[:num_rows], order[:num_rows]
        offsets = counts.cumsum(0).to(torch.int32)
        output = self.weights.forward(routed.hidden[order // choices], offsets)
        output = output * routed.torch_weights.reshape(-1)[order, None]
        if not host_knows:  # a grouped product does not write the rows after the last own one
            output = output.masked_fill((experts == own)[:, None], 0)
        rows = output.new_zeros(routed.experts.numel(), output.shape[1])
        rows[order] = output
        return rows.view(-1, choices, output.shape[1]).sum(dim=1).to(routed.hidden.dtype)

    def _own_index(self, experts: torch.Tensor) -> torch.Tensor:
        """[t * K]: each choice relative to the first own expert; other experts get the number after the last."""
        own, flat = self.weights.own, experts.reshape(-1)
        if own.size == self.weights.num_experts:
            return flat
        return torch.where((flat >= own.start) & (flat < own.stop), flat - own.start, own.size)

    @property
    def num_experts(self) -> int:
        """Experts of the layer over all ranks."""
        return self.weights.num_experts

    def token_counts(self) -> list[int]:
        """Tokens that each own expert has computed so far, with the padding of captured steps; waits for the device."""
        counts: list[int] = [0] * self.weights.own.size if self._num_tokens is None else self._num_tokens.tolist()
        return counts

    def forget_counts(self) -> None:
        """Count from zero again. In place: captured steps go on counting in the same memory."""
        if self._num_tokens is not None:
            with torch.inference_mode():  # as steps run
                self._num_tokens.zero_()

    def _counts(self, device: torch.device) -> torch.Tensor:
        """The counts of the own experts, [own experts] int64, to be added to."""
        if self._num_tokens is None:
            self._num_tokens = torch.zeros(self.weights.own.size, dtype=torch.int64, device=device)
        return self._num_tokens


def host_reads(layers: Sequence[ExpertLayer], device: torch.device) -> str:
    """Why the host has to read from `device` how many tokens each expert has; "": it does not, in any mode.

    Captured steps never send tokens to the owners of their experts by counts, so this does not depend on the mode.
    """
    if not layers or runs_products(device):
        return ""
    return f"experts are multiplied one by one, because {device} does not run the Triton kernel for all at once"


def shift_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts of one layer in any mode, in the form transformers' `ExpertsInterface` asks for.

    hidden_states: [t, H]; top_k_index, top_k_weights: [t, K]; returns [t, H], summed over the TP group.
    """
    context = step_context()
    return context.collectives.sum_over_tp(partial_experts(module, hidden_states, top_k_index, top_k_weights))


def partial_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor | None
) -> torch.Tensor:
    """`shift_experts` without the sum over the TP group. top_k_weights: None: 1, with K = 1."""
    context = step_context()
    own = slice(context.num_local_tokens)  # an empty slice runs a dummy token, which no expert has to process
    weights = None if top_k_weights is None else top_k_weights[own]
    output: torch.Tensor = module.expert_layer.forward(Routed(hidden_states[own], top_k_index[own], weights), context)
    return output if len(output) == len(hidden_states) else torch.zeros_like(hidden_states)


def _routing_on(hidden: torch.Tensor) -> Any:
    """The functions that sort tokens [t, H] by expert and sum the results: of Triton, or C; None: only torch's."""
    if runs_products(hidden.device):
        from ulysses_infer.kernels import routing

        return routing
    step = step_context_or_none()
    if hidden.device.type != "cpu" or step is None or step.matmul is None or not is_available("routing"):
        return None
    from ulysses_infer.native import routing as native_routing

    return native_routing if hidden.dtype in native_routing.TYPES else None


def _sum_of_parts(parts: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
    """parts: [t, n, H]; added: [t, H]; returns their sum, [t, H]."""
    if runs_products(parts.device):
        from ulysses_infer.kernels.routing import sum_of_parts

        return sum_of_parts(parts, added)
    output = parts.sum(dim=1)
    return output if added is None else output + added


def register() -> None:
    """Register `shift_experts` with transformers under our own name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, shift_experts)
