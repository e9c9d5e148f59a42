"""Metrics, dashboard and logs of the server."""

from ulysses_infer.server.observe.observatory import Observatory

__all__ = ["Observatory"]
