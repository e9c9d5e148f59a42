"""The contenders of a comparison: ways of using the same ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REPLICAS, GROUP = "replicas", "group"
"""Kinds of servers: one engine per rank, or one engine on all ranks. Each method of speculation has a group of its
own, named like the method."""


@dataclass(frozen=True)
class Contender:
    """One way of using the ranks."""

    name: str
    title: str
    server: str
    """`REPLICAS`, `GROUP` or a method of speculation."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """Body of `PUT /admin/policy`; empty: the policy that the server starts with."""
    is_static: bool = True
    """Whether all of its steps run in the same mode."""


def _static(mode: str) -> dict[str, Any]:
    return {"name": "static", "settings": {"mode": mode}}


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("dp", "data parallel", REPLICAS),
        Contender("tp", "tensor parallel", GROUP, _static("tp")),
        Contender("sp", "sequence parallel", GROUP, _static("sp")),
        Contender("shift", "shift, threshold", GROUP, {"name": "threshold"}, is_static=False),
        Contender("adaptive", "shift, adaptive", GROUP, {"name": "adaptive"}, is_static=False),
    )
}
"""By name, in display order."""


def speculating(method: str) -> Contender:
    """The adaptive policy with a method of `speculation.method`."""
    return Contender(method, f"shift, adaptive, drafts of {method}", method, {"name": "adaptive"}, is_static=False)


def policy_of(contender: Contender, threshold_tokens: int) -> dict[str, Any]:
    """The policy to set; the threshold comes from the recipe."""
    if contender.name == "shift":
        return {**contender.policy, "settings": {"threshold_tokens": threshold_tokens}}
    return dict(contender.policy)
