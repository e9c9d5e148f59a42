"""Ranks of their own for the tests that train: DeepSpeed keeps groups and settings for a whole process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPools


@pytest.fixture(scope="session")
def training_ranks() -> Iterator[RankPools]:
    """As `rank_pool`."""
    pools = RankPools()
    yield pools
    pools.close()
