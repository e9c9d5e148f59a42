"""The three placements of experts on ranks, and the choice between them. It is the same in every mode.

`replicate`: every TP slice of the base mode holds its part of the width of every expert, as dense layers do, and modes
read views of it (arXiv 2509.16495 §3.2). `expert`: each of the W ranks owns E/W whole experts. `width`: each rank owns
1/W of the width of every expert. The latter two store 1/W of the experts whatever the base mode is.
"""

from __future__ import annotations

import logging

from ulysses_infer.errors import ConfigError
from ulysses_infer.model.experts.kinds import ExpertSizes
from ulysses_infer.parallel.layout import Layout, divisors

logger = logging.getLogger(__name__)

REPLICATE, EXPERT, WIDTH = PLACEMENTS = ("replicate", "expert", "width")
WEIGHTS_SHARE = 0.5  # share of a rank's memory that replicated weights may take; the rest is for cache and activations
GIB = 1 << 30


def choose_placement(wanted: str, layout: Layout, sizes: ExpertSizes, available: int | None) -> str:
    """The placement to use. `auto` decides by memory, from values that are the same on all ranks.

    available: the smallest memory of any rank in bytes; None: unlimited.
    """
    if wanted != "auto":
        return wanted
    if sizes.num_experts == 0 or layout.world_size == 1 or available is None:
        return REPLICATE
    others = sizes.other_bytes // layout.base.tp
    replicated, owned = (others + sizes.expert_bytes // parts for parts in (layout.base.tp, layout.world_size))
    chosen = EXPERT if sizes.num_experts % layout.world_size == 0 else WIDTH
    chosen = REPLICATE if replicated <= WEIGHTS_SHARE * available else chosen
    logger.info(
        "parallel.expert_placement auto: %s (of %.1f GiB a rank, weights take %.1f GiB replicated, else %.1f GiB)",
        chosen,
        available / GIB,
        replicated / GIB,
        owned / GIB,
    )
    return chosen


def check_width(layout: Layout, placement: str, width: int) -> None:
    """Raise `ConfigError`, naming what would work, if experts of `width` cannot be split evenly."""
    if placement == WIDTH and width % layout.world_size:
        fitting = ", ".join(str(ranks) for ranks in divisors(width) if ranks <= 2 * layout.world_size)
        raise ConfigError(
            f"parallel.expert_placement width cuts experts of width {width} over sp * tp = {layout.world_size} ranks, "
            f"which does not divide it; use expert_placement expert or replicate, or sp * tp = one of {fitting}"
        )
