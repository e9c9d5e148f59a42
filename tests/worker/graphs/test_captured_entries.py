"""Compressed keys in captured steps: nothing waits for the device, and kernels give what torch gives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.test_compressed_keys import compressed_config, make_compressed
from tests.worker.graphs.capturing import MIXED, make_rank, run_step
from tests.worker.graphs.test_captured_selection import META, compare
from ulysses_infer.kernels.launch import assume
from ulysses_infer.worker.graphs.capture_checker import CaptureChecker


def test_decodes_with_compressed_keys_are_captured_and_no_step_waits_for_the_device(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    config = compressed_config("short and long")
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    room = {"scheduler.max_num_batched_tokens": 256, "scheduler.max_num_seqs": 8, "cache.num_blocks": 256}
    with assume("meta", (9, 0)):
        rank = make_rank(tmp_path, 2, **{"model.max_model_len": 128, **room})
        assert rank.worker.graphs is not None
        with CaptureChecker(META, assumes_pinned=True):
            for mode, eager in itertools.product(rank.groups.by_mode, (False, True)):
                assert run_step(rank, mode, (1, 1, 1), eager).shape[0] == 2
                assert run_step(rank, mode, MIXED, True).shape[0] == 4


def compare_kernels(folder: str, sp: int, seed: int) -> tuple[int, float, int]:
    """On a rank: see `compare`."""
    from ulysses_infer.attention import entries

    entries.runs_kernels = lambda device: True
    return compare(folder, sp, seed)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("sp", [1, 2])
def test_kernels_in_captured_steps_give_what_torch_gives(sp: int, rank_pool: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    make_compressed("short and long", tmp_path)
    results = rank_pool(sp).run(compare_kernels, str(tmp_path), sp, 3, timeout=500)
    count, difference, replays = results[0]  # which gets the logits
    assert count > 10
    assert difference < 1e-4
    assert replays > 4
    assert all(others == replays for _, _, others in results), "ranks capture and replay alike"
