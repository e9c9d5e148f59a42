"""Fixtures for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.ranks import RankPools
from tests.tiny import tiny_llama
from ulysses_infer.child_processes import end_children_with_this_process

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

hypothesis.settings.register_profile("ulysses_infer", deadline=None, derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("ulysses_infer")


# Tests that mostly wait for processes. They go first, so that other workers compute meanwhile and none is left alone.
WAITING = (
    "tests/server/test_faults",
    "tests/job",
    "tests/training",
    "tests/server",
    "tests/test_launch",
    "tests/bench",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files for `--dist loadfile`, which hands them out in this order."""
    items.sort(
        key=lambda item: next((i for i, name in enumerate(WAITING) if item.nodeid.startswith(name)), len(WAITING))
    )


def pytest_configure() -> None:
    """Nothing that a test starts outlives the session, even if the session is killed."""
    end_children_with_this_process()


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPools]:
    """`rank_pool(world_size).run(function, *args)`: the function's result on each of that many ranks, in rank order.

    The ranks are real processes with a gloo group, started once a session and used by all tests; the function and
    what it takes and returns go through pickle. `tests/ranks.py` says how errors and hangs come back. Mark tests that
    use it `distributed`.
    """
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the tiny Llama, with its tokenizer; not to be changed."""
    made = tmp_path_factory.mktemp("llama")
    tiny_llama(made)
    return str(made)
