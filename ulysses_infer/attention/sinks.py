"""Attention sinks for kernels without support for them."""

from __future__ import annotations

import torch


def with_sinks(output: torch.Tensor, log_sum: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Attention with sinks from attention without.

    A sink adds exp(sink) to the softmax's denominator and nothing to its numerator, so it scales the output by
    exp(lse) / (exp(lse) + exp(sink)). output: [T, Hq, dv]; log_sum: [T, Hq], natural logarithm; sinks: [Hq].
    """
    share = torch.sigmoid(log_sum.float() - sinks.float())
    return output * share[..., None].to(output.dtype)
