"""The heap of this process: freed memory is kept for the next step, and live objects are hidden from the collector."""

from __future__ import annotations

import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
YOUNG_OBJECTS = 50_000


def keep_freed_memory() -> bool:
    """Stop the heap from returning freed memory to the system, until `return_freed_memory`.

    By default glibc returns the intermediate results of every large step, and the next step has to touch new pages
    again: a tenth of the time of a 2000-token prefill of a small model. Returns False if the C library has no such
    setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    keeps = mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mallopt(M_MMAP_MAX, 0) and keeps)


def return_freed_memory() -> None:
    """Return every unused page to the system, also from the middle of the heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; other allocators keep little
    if trim is not None:
        trim(0)


def relax_gc() -> None:
    """Let the garbage collector run after 50,000 new objects instead of 700.

    For processes of the engine's own, at their start: the imports of torch and transformers make a million objects
    that stay, and scanning them again and again takes a tenth of the start.
    """
    gc.set_threshold(YOUNG_OBJECTS)


def freeze_gc() -> None:
    """Freeze live objects so that the garbage collector stops scanning them.

    For serving processes: a full collection over the objects of torch and transformers would stop token streams for a
    fifth of a second.
    """
    gc.collect()
    gc.freeze()
