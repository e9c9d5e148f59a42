"""Hypothetical improvements of the engine, whose gain the step time model can tell before they are built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Changes:
    """What to assume beyond, or short of, the engine as it is."""

    fused_all_reduce: bool = True
    """Residual addition and norm in the kernel of the all-reduce (as the engine does on GPUs)."""
    fp8_exchange: bool = False
    """The all-to-all sends FP8 instead of bf16."""
    attention_by_request: bool = False
    """At saturation, ranks attend to whole requests instead of heads, so no KV head is read by more than one."""
