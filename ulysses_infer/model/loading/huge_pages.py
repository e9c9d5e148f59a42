"""Huge pages for weights in a CPU's memory: a step reads all weights, and with small pages an address per 4 KiB."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ulysses_infer.arithmetic import round_up

logger = logging.getLogger(__name__)
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
LARGEST = 2 << 20
"""Bytes of a huge page. Larger ones (512 MiB with Arm's pages of 64 KiB) would take in too much other memory."""
LEAST_BYTES = 1 << 16
"""Of a tensor: smaller ones need few pages anyway."""
PREFER, COLLAPSE = 14, 25
"""Linux' MADV_HUGEPAGE and MADV_COLLAPSE (since 6.1), see madvise(2): now, not when the kernel gets to it."""
Advise = Callable[[int, int, int], int]


def use_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Move the memory of large CPU tensors to huge pages. Addresses stay the same.

    Does nothing where the system has none or refuses: on other systems than Linux, if the administrator has set
    `never`, for pages of files, and for other devices.
    """
    size, advise = huge_page_bytes(), _madvise()
    if not size or advise is None:
        return
    refused = 0
    for start, stop in _ranges(tensors, size):
        advise(start, stop - start, PREFER)
        refused += (stop - start) * bool(advise(start, stop - start, COLLAPSE))
    if refused:
        logger.debug("%.0f MB of weights stay in small pages, all or some of them", refused / 1e6)


def huge_page_bytes(settings: Path = SETTINGS) -> int:
    """Bytes of a huge page; 0 if there are none for programs that ask."""
    try:
        is_off = "[never]" in (settings / "enabled").read_text()
        size = int((settings / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return 0 if is_off or size > LARGEST else size


def _ranges(tensors: Iterable[torch.Tensor], size: int) -> list[tuple[int, int]]:
    """The whole huge pages in which the tensors' memory is, joined where they touch: tensors share pages."""
    storages = (each.untyped_storage() for each in tensors if each.device.type == "cpu")
    found = sorted({(each.data_ptr(), each.nbytes()) for each in storages if each.nbytes() >= LEAST_BYTES})
    joined: list[tuple[int, int]] = []
    for address, num_bytes in found:
        start, stop = address // size * size, round_up(address + num_bytes, size)
        if joined and start <= joined[-1][1]:
            start, stop = joined[-1][0], max(stop, joined.pop()[1])
        joined.append((start, stop))
    return joined


@functools.cache
def _madvise() -> Advise | None:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
