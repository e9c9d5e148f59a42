"""Attention sinks for kernels that do not support them."""

from __future__ import annotations

import torch


def with_sinks(output: torch.Tensor, log_sum_exp: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Add sinks to the output of attention without sinks.

    A sink adds exp(sink) to the softmax's denominator and nothing to its numerator, so it scales the output by
    exp(lse) / (exp(lse) + exp(sink)). output: [T, Hq, dv]; log_sum_exp: [T, Hq], natural logarithm; sinks: [Hq].
    """
    share = torch.sigmoid(log_sum_exp.float() - sinks.float())
    return output * share[..., None].to(output.dtype)
