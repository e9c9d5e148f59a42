"""The C library's heap on a CPU: what a step frees is kept for the next one."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_IN_HEAP = 32 << 20
"""Bytes; larger tensors get pages of their own in any case: glibc takes no higher threshold."""


def keep_freed_memory() -> bool:
    """Let the heap of this process keep what is freed, but for tensors above `LARGEST_IN_HEAP`.

    As it is, glibc gives the intermediate results of every large step back to the system, and the next step touches
    them page by page again: in a prefill of 2000 tokens of a small model a tenth of the time. `malloc_trim` still gives
    it back, as `sleep` does. Returns False where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    keeps = mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP) and keeps)
