"""Policies: objects that choose the mode of each step; they can be replaced at run time."""

from ulysses_infer.engine.policies.adaptive import AdaptivePolicy
from ulysses_infer.engine.policies.policy import Decision, Policy
from ulysses_infer.engine.policies.selection import POLICIES, make_policy, policy_settings
from ulysses_infer.engine.policies.static import StaticPolicy
from ulysses_infer.engine.policies.threshold import ThresholdPolicy

__all__ = [
    "POLICIES",
    "AdaptivePolicy",
    "Decision",
    "Policy",
    "StaticPolicy",
    "ThresholdPolicy",
    "make_policy",
    "policy_settings",
]
