"""What adapters share: attention modules that keep the weights of transformers' own, and the replacement of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ulysses_infer.cache.entries import EntryShape
from ulysses_infer.model.injection.rules import AttentionRule
from ulysses_infer.model.layers.attention import shift_attention
from ulysses_infer.model.layers.head_plan import HeadPlan


class Adapted(nn.Module):
    """A module of transformers with another forward: its weights, names and sizes stay."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        vars(self).update(vars(source))

    if TYPE_CHECKING:  # attributes of the source

        def __getattr__(self, name: str) -> Any: ...


class AdaptedAttention(Adapted):
    """An attention module; subclasses compute queries, keys and values from the projections, and call `attend`."""

    layer_idx: int
    head_dim: int
    head_plan: HeadPlan
    attention_rules: Mapping[str, AttentionRule] = MappingProxyType({})
    """Sharding rules of its linear layers that differ from those of other modules with the same names."""
    replicated_parameters: tuple[str, ...] = ()
    """Its own parameters that every rank needs whole."""
    cache_entries: tuple[EntryShape, ...] = ()
    """What it caches beside keys and values."""
    values_are_keys: bool = False
    """Whether it attends to one tensor as keys and values, which is cached once."""
    read_weights: tuple[str, ...] = ()
    """Linear layers whose weights it reads itself instead of calling them, so that LoRA adapters would be ignored."""
    projections_elsewhere: tuple[tuple[nn.Module, str, AttentionRule], ...] = ()
    """Linear layers that are not its children: the modules that have them, their names there, and their rules."""

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        """projected: [1, t, heads * d]; returns [1, heads, t, d]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """query: [1, Hq/tp, t, d]; key, value: [1, Hkv/tp, t, d]; returns [1, t, Hq/tp * d].

        options: those of `shift_attention`.
        """
        output, _ = shift_attention(self, query, key, value, None, **options)
        return output.flatten(2)


class SeparateAttention(AdaptedAttention):
    """Separate q, k and v without positions, as in most models."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; returns ([1, t, D], None)."""
        query, key, value = (self.heads(each(hidden_states)) for each in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend(query, key, value, scaling=self.scaling)), None


def replace_all(model: nn.Module, name: str, make: Callable[[Any], nn.Module]) -> None:
    """Replace every module of `model` whose class is called `name` by what `make` makes of it."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == name:
            model.set_submodule(path, make(module))
