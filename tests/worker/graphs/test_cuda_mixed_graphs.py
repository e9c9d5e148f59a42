"""Captured steps with prompt tokens: the logits of the same steps layer by layer, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint
from tests.tiny import settings as engine_settings
from tests.worker.graphs.test_cuda_graphs import BACKENDS, LARGEST, STEPS, CountingCapturer, Driver, make_worker
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.config import load_config
from ulysses_infer.job.start_rank import start_rank
from ulysses_infer.worker.graphs.cuda_mixed_graphs import GRANULARITY, MixedGraphRunner, token_sizes

MOST_TOKENS = 16


@given(st.integers(1, 2048), st.sampled_from([1, 2, 3, 4, 8]))
def test_sizes_are_even_over_the_slices_and_waste_little(max_tokens: int, sp: int) -> None:
    sizes = token_sizes(max_tokens, sp)
    assert sizes == sorted(set(sizes))
    assert all(size % sp == 0 for size in sizes)
    assert max_tokens <= sizes[-1] < max_tokens + sp
    for tokens in (max_tokens, max_tokens // 2 + 1, max_tokens // 3 + 1):
        assert next(size for size in sizes if size >= tokens) - tokens < GRANULARITY + sp


def test_none_are_captured_if_the_recipe_says_so() -> None:
    assert token_sizes(0, 2) == []


def compare(folder: str, sp: int, tp: int, lazily: bool, seed: int) -> tuple[int, float, int, int]:
    """On a rank: rows compared, the largest difference, and how many steps were captured and replayed."""
    rank = start_rank(load_config({"model.path": folder, **engine_settings(sp, tp)}))
    try:
        capturer = CountingCapturer()
        eager, captured = make_worker(rank, TorchLoopAttention()), make_worker(rank, BACKENDS["flash_attn"]())
        runner = MixedGraphRunner(
            captured.model, captured.contexts, captured.eager.inputs, capturer, LARGEST, MOST_TOKENS
        )
        captured.mixed_graphs = runner
        if not lazily:
            runner.capture_all()
        driver = Driver(list(rank.groups.by_mode), rank.worker.cache.groups.attention_spans, seed)
        count, difference, prompts = 0, 0.0, 0
        for step in range(STEPS):
            plan = driver.plan(step)
            found: list[Any] = []
            wanted: list[Any] = []
            eager.run(plan._replace(token_ids=driver.known, keeps_tokens=False), driver.keep(wanted))
            captured.run(plan, driver.keep(found))
            prompts += runner.accepts(plan) and plan.num_tokens > len(plan.items) > 1
            if step == STEPS // 2:
                rank.worker.model.rebind()
            for rows, others in zip(found, wanted, strict=True):
                assert rows.isfinite().all()
                count += len(rows)
                difference = max(difference, float((rows - others).abs().max()))
        assert prompts > 0, "prompts beside decodes"
        assert driver.num_placeholders > 3
        return count, difference, capturer.captured, capturer.replays
    finally:
        rank.groups.close()


@pytest.mark.parametrize("lazily", [False, True])
def test_a_captured_step_gives_the_logits_of_an_eager_one(rank_pool: Any, folder: str, lazily: bool) -> None:
    ((count, difference, captured, replays),) = rank_pool(1).run(compare, folder, 1, 1, lazily, 3)
    assert (count > 20, captured > 0, replays > 15) == (True, True, True)
    assert difference < 1e-4


def test_layers_with_windows_read_their_own_blocks(rank_pool: Any, tmp_path: Any) -> None:
    make_checkpoint(tiny_config("mistral", sliding_window=8), tmp_path)
    ((count, difference, captured, replays),) = rank_pool(1).run(compare, str(tmp_path), 1, 1, True, 3)
    assert (count > 20, captured > 0, replays > 15) == (True, True, True)
    assert difference < 1e-4


@pytest.mark.distributed
def test_ranks_whose_modes_flip_agree(rank_pool: Any, folder: str) -> None:
    first, second = rank_pool(2).run(compare, folder, 2, 1, False, 1)
    assert first[0] > 20
    assert first[1] < 1e-4
    assert first[2:] == second[2:], "ranks capture and replay alike"
    assert first[3] > 15
