"""The contenders of a comparison: ways of using the same ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REPLICAS, GROUP = "replicas", "group"
"""The two kinds of servers: one engine per rank, or one engine on all ranks."""


@dataclass(frozen=True)
class Contender:
    """One way of using the ranks."""

    name: str
    title: str
    server: str
    """`REPLICAS` or `GROUP`."""
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


def policy_of(contender: Contender, threshold_tokens: int) -> dict[str, Any]:
    """The policy to set; the threshold comes from the recipe."""
    if contender.name == "shift":
        return {**contender.policy, "settings": {"threshold_tokens": threshold_tokens}}
    return dict(contender.policy)
