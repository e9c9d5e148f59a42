"""Fixtures for every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from tests.ranks import RankPools
from tests.tiny import tiny_llama
from ulysses_infer.child_processes import end_children_with_this_process

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # dozens of programs import the package: the first one compiles it

hypothesis.settings.register_profile("ulysses_infer", deadline=None, derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("ulysses_infer")


# Tests that start programs and servers. One worker runs them one after another: their ranks would disturb each other.
PROGRAMS = (
    "tests/server/test_",
    "tests/job",
    "tests/training",
    "tests/test_launch",
    "tests/bench/compare/test_compare_command",
    "tests/bench/test_bench",
    "tests/engine/test_calibration",
    "tests/benchmarks",
    "tests/cli/test_killed_commands",
)


def group_of(nodeid: str) -> str:
    """The tests that one worker runs one after another: all that start programs, and those of each other file."""
    return "programs" if nodeid.startswith(PROGRAMS) else nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start programs go first: together they take longer than any file."""
    items.sort(key=lambda item: group_of(item.nodeid) != "programs")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups of tests for the workers of pytest-xdist."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


def pytest_configure() -> None:
    """Nothing that a test starts outlives the session, even if the session is killed."""
    end_children_with_this_process()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Libraries and tests stay until the end: the garbage collector scans them neither now nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPools]:
    """`rank_pool(world_size).run(function, *args)`: the function's result on each of that many ranks, in rank order.

    The ranks are real processes with a gloo group, started once per session and used by all tests; the function and
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
