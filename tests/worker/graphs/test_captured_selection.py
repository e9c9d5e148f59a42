"""Learned sparse attention in captured steps: nothing waits for the device, and kernels select as torch does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.test_selected_keys import config_of
from tests.equivalence.tiny_models import make_checkpoint
from tests.tiny import settings
from tests.worker.graphs.capturing import MIXED, make_rank, run_step
from tests.worker.graphs.test_cuda_graphs import CountingCapturer, Driver, make_worker
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.config import load_config
from ulysses_infer.job.start_rank import start_rank
from ulysses_infer.kernels.launch import assume
from ulysses_infer.worker.graphs.capture_checker import CaptureChecker

STEPS = 12
META = torch.device("meta")


@pytest.mark.parametrize(
    "name", ["deepseek_v32", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("glm_moe_dsa", "hy_v4"))]
)
def test_steps_with_an_index_are_captured_and_do_not_wait_for_the_device(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    config = config_of(name)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    room = {"scheduler.max_num_batched_tokens": 256, "scheduler.max_num_seqs": 8, "cache.num_blocks": 256}
    with assume("meta", (9, 0)):
        rank = make_rank(tmp_path, 2, **{"model.max_model_len": 128, **room})
        assert rank.worker.cache.index_keys
        assert rank.worker.graphs is not None
        with CaptureChecker(META, assumes_pinned=True):
            for mode, eager in itertools.product(rank.groups.by_mode, (False, True)):
                assert run_step(rank, mode, (1, 1, 1), eager).shape[0] == 2
                captured_prompts = rank.worker.mixed_graphs is not None
                assert run_step(rank, mode, MIXED, eager or not captured_prompts).shape[0] == 4


def compare(folder: str, sp: int, seed: int) -> tuple[int, float, int]:
    """On a rank: rows compared, the largest difference of kernels in captured steps from torch, and replays."""
    from ulysses_infer.attention import index
    from ulysses_infer.attention.triton import TritonAttention

    index.runs_kernels = lambda device: True
    rank = start_rank(load_config({"model.path": folder, **settings(sp, 1)}))
    try:
        capturer = CountingCapturer()
        eager = make_worker(rank, TorchLoopAttention())
        captured = make_worker(rank, TritonAttention(), capturer)
        driver = Driver(list(rank.groups.by_mode), rank.worker.cache.groups.attention_spans, seed)
        count, difference = 0, 0.0
        for step in range(STEPS):
            plan = driver.plan(step)
            found: list[Any] = []
            wanted: list[Any] = []
            eager.run(plan._replace(token_ids=driver.known, keeps_tokens=False), driver.keep(wanted))
            captured.run(plan, driver.keep(found))
            for rows, others in zip(found, wanted, strict=True):
                count += len(rows)
                difference = max(difference, float((rows - others).abs().max()))
        return count, difference, capturer.replays
    finally:
        rank.groups.close()


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("sp", [1, 2])
def test_kernels_in_captured_steps_select_what_torch_selects(sp: int, rank_pool: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    make_checkpoint(config_of("glm_moe_dsa"), tmp_path)
    results = rank_pool(sp).run(compare, str(tmp_path), sp, 3, timeout=500)
    count, difference, replays = results[0]  # which gets the logits
    assert count > 10
    assert difference < 1e-4
    assert replays > 4
    assert all(others == replays for _, _, others in results), "ranks capture and replay alike"
