"""Mixture-of-experts layers: placement, stored weights, and the function that transformers calls."""

from ulysses_infer.model.experts.kinds import expert_sizes, is_experts, scales_inputs
from ulysses_infer.model.experts.layer import EXPERTS_NAME, ExpertLayer, host_reads, register
from ulysses_infer.model.experts.placement import choose_placement
from ulysses_infer.model.experts.scaled_inputs import ScaledInputExperts

__all__ = [
    "EXPERTS_NAME",
    "ExpertLayer",
    "ScaledInputExperts",
    "choose_placement",
    "expert_sizes",
    "host_reads",
    "is_experts",
    "register",
    "scales_inputs",
]
