"""Weight updates, sleep and wake-up on one rank, while no request runs."""

from __future__ import annotations

from typing import Any

import torch

from ulysses_infer.engine.sleep import CACHE_AND_WEIGHTS
from ulysses_infer.errors import fatal
from ulysses_infer.model.loading.sources import open_weights
from ulysses_infer.worker.memory import return_freed_memory
from ulysses_infer.worker.rank import Rank


def update_weights(rank: Rank, source: Any) -> None:
    """Replace the weights with those of `source`. Collective; nothing is written unless all ranks can write."""
    opened = rank.channel.together(lambda: open_weights(source))
    rank.channel.together(lambda: rank.weights.check(opened))
    with fatal("writing the new weights"):
        rank.channel.together(lambda: rank.weights.write(opened))


def sleep(rank: Rank, level: int) -> None:
    """Free the memory of the cache, and with level 2 also that of the weights."""
    rank.worker.release_caches()
    for graphs in rank.worker.all_graphs:
        graphs.invalidate()
    if level == CACHE_AND_WEIGHTS:
        rank.weights.drop()
    _return_free_memory(rank.worker.device)


def wake_up(rank: Rank) -> None:
    """Allocate the cache again. Collective; an error on any rank is raised on all, and then none has a cache."""
    try:
        rank.channel.together(rank.worker.take_caches)
    except Exception:
        rank.worker.release_caches()
        raise


def _return_free_memory(device: torch.device) -> None:
    """Return memory that the allocator has cached to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()
