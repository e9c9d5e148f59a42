"""`DraftHead`, a head that runs in the modes of the served model, and `HeadBuilder`, which loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ulysses_infer.model.context import StepContext, use_step_context
from ulysses_infer.model.draft_heads.module import HeadModule
from ulysses_infer.model.fusion.fuse import Fusion
from ulysses_infer.model.injection.inject import Injection
from ulysses_infer.model.injection.probe import probe
from ulysses_infer.model.layers.rotary import freeze_rotary
from ulysses_infer.model.loading.checkpoint import Loader
from ulysses_infer.model.loading.files import TensorSource
from ulysses_infer.model.model import ShiftModel, model_shape
from ulysses_infer.model.sampling.head import ShardedHead
from ulysses_infer.parallel.layout import Layout, Span


class HeadInjection(Injection):
    """The injection of a head with the vocabulary head of the served model."""

    def __init__(
        self, module: HeadModule, layout: Layout, shard: int, expert_placement: str, head: ShardedHead
    ) -> None:
        self._shared_head = head
        super().__init__(module, layout, shard, expert_placement)

    def _inject_head(self) -> tuple[str, ShardedHead]:
        self.head_vocab_size = self.config.vocab_size
        return "", self._shared_head


class DraftHead(ShiftModel):
    """One rank's share of a head."""

    module: HeadModule

    @property
    def vocabulary(self) -> Span:
        """The part of the head's vocabulary whose logits this rank computes."""
        return self.module.vocabulary_head.vocabulary

    @torch.inference_mode()
    def draft(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor:
        """Run over this rank's tokens.

        token_ids, positions: [t], the token after that of `hidden` [t, D], and the position of the latter; rows: [n] of
        them whose next tokens may be wanted. Returns the states of all ranks' rows for `finish`, [N, D].
        """
        self._bind(context)
        with use_step_context(replace(context, positions=positions)):
            states = self.module.states(token_ids[None], positions[None], hidden[None])[0]
            return context.collectives.gather_rows(states.index_select(0, rows), context.logits_counts)

    @torch.inference_mode()
    def finish(self, states: torch.Tensor, context: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        """states: [n, D], of `draft`. Returns the hidden states to draft the next tokens from, [n, D], and the logits,
        [n, V/W]."""
        with use_step_context(context):
            return self.module.finish(states)

    @torch.inference_mode()
    def fuse(self, hidden: torch.Tensor, context: StepContext) -> torch.Tensor:
        """What `draft` reads of the served model's hidden states. hidden: [t, F]; returns [t, D]."""
        with use_step_context(context):
            return self.module.fuse(hidden)


class HeadBuilder:
    """Builds the head of one rank. Its shapes and sizes are known before any weight is read or allocated."""

    def __init__(
        self,
        injection: Injection,
        full_shapes: dict[str, tuple[int, ...]],
        source: TensorSource,
        served: ShiftModel,
        layers: Sequence[int] = (),
    ) -> None:
        """layers: those of the served model whose inputs the head reads; none: what its vocabulary head reads."""
        self.injection, self.dtype = injection, served.dtype
        self.device: torch.device = next(served.module.parameters()).device
        self.shape = model_shape(injection, served.shape.max_model_len)
        self.layers = tuple(layers)
        self._full_shapes, self._source = full_shapes, source

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters that this rank will store."""
        return sum(p.numel() * p.element_size() for p in self.injection.model.parameters())

    def load(self, fuse: bool = True) -> DraftHead:
        """Load the weights, after those of the served model. Raises `CheckpointError`."""
        Loader(self.injection, self._source, self._full_shapes, self.dtype, self.device).load()
        self.injection.model.to(self.device)
        freeze_rotary(self.injection.model, self.shape.max_model_len)
        head = DraftHead(self.injection, self.shape, self.dtype)
        probe(head)
        if fuse:
            Fusion(head)
        for layer in self.injection.expert_layers:
            layer.forget_counts()
        return head
