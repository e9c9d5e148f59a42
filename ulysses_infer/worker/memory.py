"""A process's heaps: what steps on a CPU free is kept for the next; the objects that stay are left alone."""

from __future__ import annotations

import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let the heap of this process keep what is freed, until `return_freed_memory`.

    As it is, glibc gives the intermediate results of every large step back to the system, and the next step touches
    them page by page again: in a prefill of 2000 tokens of a small model a tenth of the time. Returns False where the C
    library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    keeps = mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mallopt(M_MMAP_MAX, 0) and keeps)


def return_freed_memory() -> None:
    """Give the system every page that nothing uses, also from the middle of the heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep little
    if trim is not None:
        trim(0)


def freeze_gc() -> None:
    """Take all that there is by now out of the sight of Python's garbage collector, which cannot free it anyway.

    For a process that does nothing but serve: looking through the objects of torch and transformers alone would stop
    it for a fifth of a second now and then, amid somebody's tokens.
    """
    gc.collect()
    gc.freeze()
