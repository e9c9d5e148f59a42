"""What the server shows of itself: metrics, the live page, the log."""

from ulysses_infer.server.observe.observatory import Observatory

__all__ = ["Observatory"]
