"""The number of replicas, by their outstanding tokens."""

from __future__ import annotations

import math
from typing import Any

OUTSTANDING_TOKENS = "outstanding_tokens"
"""The name of the metric that replicas report."""


class OutstandingTokensPolicy:
    """An autoscaling policy of Ray Serve: as many replicas as keep each at `target` outstanding tokens.

    Serve applies the bounds and the delays.
    """

    def __init__(self, target: int) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The desired number of replicas, and the policy's state, which is empty."""
        by_replica = (context.aggregated_metrics or {}).get(OUTSTANDING_TOKENS, {})
        return math.ceil(sum(by_replica.values()) / self._target), {}
