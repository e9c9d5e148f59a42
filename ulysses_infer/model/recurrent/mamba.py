"""Rules of state-space layers: Mamba and Mamba 2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ulysses_infer.cache.states import RECURRENT
from ulysses_infer.model.recurrent.native.mamba2 import NativeMamba2, has_norm
from ulysses_infer.model.recurrent.rules import Input, Owner, OwnWeight, Rule, convolution
from ulysses_infer.model.recurrent.spread import SpreadNorm, SummedLinear, check_spread
from ulysses_infer.model.recurrent.view import ModuleView
from ulysses_infer.parallel.sharding import Part, Sharding

TOKENS_AT_ONCE = 64  # of which the carried state's contribution is computed together


def mamba2(module: Any) -> Rule:
    """Mamba 2: z, x, B, C and dt one after another; each group of heads shares one B and C."""
    heads, groups = module.num_heads, module.n_groups
    inner, shared = Part(heads, module.head_dim), Part(groups, module.ssm_state_size, shared=True)
    head, mixed = Sharding((Part(heads),)), Sharding((inner, shared, shared))
    projected = Sharding((inner, inner, shared, shared, Part(heads)))
    group_count = (Part(groups, shared=True),)
    if has_norm(module):
        check_spread(module.norm)
    return Rule(
        inputs=(Input("in_proj", projected, scale="ssm_in_multiplier"),),
        output="out_proj",
        output_part=inner,
        weights=(
            *convolution("conv1d", mixed),
            *(OwnWeight(name, head) for name in ("A_log", "D", "dt_bias")),
            OwnWeight("norm.weight", Sharding((inner,))),
            OwnWeight("mup_vector", projected, 2),
        ),
        counts={
            "num_heads": (Part(heads),),
            "intermediate_size": (inner,),
            "n_groups": group_count,
            "conv_dim": mixed.parts,
            **({"norm.n_groups": group_count} if hasattr(module.norm, "n_groups") else {}),
        },
        units={"heads": (heads, False), "groups": (groups, True)},
        replaced=functools.partial(_spread_norm, groups) if has_norm(module) else None,
        functions={"mamba2_selective_state_update": update_within_limits} if _limits_steps(module) else {},
        native=lambda own, dtype, owner: NativeMamba2.of(own, dtype, owner, groups),
    )


def _limits_steps(module: Any) -> bool:
    """Whether time steps are limited (Nemotron-H)."""
    low, high = module.time_step_limit
    return low > 0.0 or high < torch.inf


def update_within_limits(
    view: ModuleView,
    update: Callable[..., torch.Tensor],
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    *arguments: Any,
    dt_bias: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """transformers' `update` by one token, which does not limit time steps as its form for several tokens does.

    dt, dt_bias: [n, H, d], [H, d].
    """
    steps = F.softplus(dt + dt_bias.to(dt.dtype)).clamp(*view.time_step_limit)
    return update(state, hidden_states, steps, *arguments, **{**options, "dt_softplus": False})


def _spread_norm(groups: int, module: Any, owner: Owner) -> Mapping[str, Any]:
    return {"norm": SpreadNorm(module.norm, groups, owner)} if groups < owner.world_size else {}


def mamba(module: Any) -> Rule:
    """Mamba: channels on their own, but for the projection that makes dt, B and C of all of them."""
    inner = Part(module.intermediate_size)
    channels = Sharding((inner,))
    return Rule(
        inputs=(Input("in_proj", Sharding((inner, inner))),),
        output="out_proj",
        output_part=inner,
        weights=(
            *convolution("conv1d", channels),
            *(OwnWeight(name, channels) for name in ("A_log", "D", "dt_proj.weight", "dt_proj.bias")),
            OwnWeight("x_proj.weight", channels, 1),
        ),
        counts={"intermediate_size": (inner,)},
        units={"channels": (inner.units, False)},
        replaced=lambda layer, _: {"x_proj": SummedLinear(layer.x_proj)},
        functions={"mamba_selective_scan": scan_from_state},
    )


def zamba(module: Any) -> Rule:
    """Zamba: Mamba in heads, each with its own projection to dt, B and C; x and gate alternate channel by channel."""
    heads, width = module.n_mamba_heads, module.mamba_head_dim
    each, inner = Sharding((Part(heads),)), Part(heads, width)
    return Rule(
        inputs=(Input("in_proj", Sharding((Part(heads, 2 * width),))),),
        output="out_proj",
        output_part=inner,
        weights=(
            *convolution("conv1d", Sharding((inner,))),
            *(OwnWeight(name, each) for name in ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")),
        ),
        counts={"n_mamba_heads": (Part(heads),), "intermediate_size": (inner,)},
        units={"Mamba heads": (heads, False)},
        functions={"mamba_selective_scan": scan_from_state},
    )


def scan_from_state(
    view: ModuleView,
    scan: Callable[..., Any],
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    rates: torch.Tensor,
    entries: torch.Tensor,
    exits: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `scan`, which starts from zeros, and what the carried state adds to it.

    hidden_states, dt, z: [n, C, L]; rates (A): [C, N]; entries, exits (B, C): [n, N, L]; returns [n, C, L] and the
    state [n, C, N].
    """
    output, last = scan(
        hidden_states, dt, rates, entries, exits, delta_bias=delta_bias, **{**options, "return_last_state": True}
    )
    before = view.states.state(RECURRENT)
    if before is not None and before.dim() > last.dim():  # one scan per head: `rates` is that of a head in all of them
        before = before[:, rates.storage_offset() // rates.numel()]
    if before is not None:
        steps = F.softplus(dt + delta_bias.to(dt.dtype)[..., None]).float().cumsum(dim=-1)
        output = output + _carried(before, steps, rates, exits).to(output.dtype)
        last = last + before * torch.exp(rates * steps[..., -1, None])
    return output * F.silu(z), last


def _carried(before: torch.Tensor, steps: torch.Tensor, rates: torch.Tensor, exits: torch.Tensor) -> torch.Tensor:
    """What the state before the tokens adds to the output of each. before: [n, C, N]; steps, cumulative: [n, C, L]."""
    pieces = [
        torch.einsum("bcln,bcn,bnl->bcl", torch.exp(rates[:, None] * piece[..., None]), before, out.float())
        for piece, out in zip(steps.split(TOKENS_AT_ONCE, -1), exits.split(TOKENS_AT_ONCE, -1), strict=True)
    ]
    return torch.cat(pieces, dim=-1)
