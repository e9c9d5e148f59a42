"""Attention back ends and captured steps over caches whose layers differ, or read each other's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.unequal import make_unequal
from tests.tiny import settings
from tests.worker.graphs.test_cuda_graphs import BACKENDS, CountingCapturer, Driver, make_worker
from ulysses_infer.attention.backend import AttentionBackend
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.config import load_config
from ulysses_infer.job.start_rank import start_rank
from ulysses_infer.native.library import is_available

pytestmark = pytest.mark.distributed
STEPS, SECONDS = 24, 600.0
thorough = pytest.mark.thorough


def make_backend(name: str) -> AttentionBackend:
    if name == "native":
        return NativeAttention()
    if name == "triton":
        from ulysses_infer.attention.triton import TritonAttention

        return TritonAttention()
    return BACKENDS[name]()


def compare(folder: str, base: tuple[int, int], name: str, steps: int) -> tuple[int, float, int]:
    """On a rank: rows compared with torch's attention, the largest difference, and how many steps were replayed."""
    rank = start_rank(load_config({"model.path": folder, **settings(*base)}))
    try:
        capturer = None if name == "native" else CountingCapturer()
        expected, worker = make_worker(rank, TorchLoopAttention()), make_worker(rank, make_backend(name), capturer)
        driver = Driver(list(rank.groups.by_mode), rank.worker.cache.groups.attention_spans, seed=3)
        count, difference = 0, 0.0
        for step in range(steps):
            plan = driver.plan(step)
            found: list[torch.Tensor] = []
            wanted: list[torch.Tensor] = []
            expected.run(plan._replace(token_ids=driver.known, keeps_tokens=False), driver.keep(wanted))
            worker.run(plan, driver.keep(found))
            for rows, others in zip(found, wanted, strict=True):
                count += len(rows)
                difference = max(difference, float((rows - others).abs().max()))
        check_sharing(worker.cache)
        return count, difference, 0 if capturer is None else capturer.replays
    finally:
        rank.groups.close()


def check_sharing(cache: Any) -> None:
    """A layer that reads another one's cache takes no memory."""
    held = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in (*cache.keys, *cache.values)}
    assert len(held) == 2 * len(cache.shape.own_layers)
    for layer, source in cache.shape.sources:
        assert cache.keys[layer] is cache.keys[source]


@pytest.mark.parametrize(
    ("model", "base", "name"),
    [
        ("gemma4-small", (2, 1), "flash_attn"),
        pytest.param("gemma4-small", (1, 1), "triton", marks=thorough),
        pytest.param("gemma4-small", (2, 1), "triton", marks=thorough),
        pytest.param("gemma4-small", (1, 1), "native", marks=thorough),
        pytest.param("gemma4-large", (2, 1), "triton", marks=thorough),
        pytest.param("gemma4-large", (1, 1), "flashinfer", marks=thorough),
        pytest.param("gemma3n", (2, 1), "triton", marks=thorough),
        pytest.param("gemma3n", (2, 1), "flash_attn", marks=thorough),
        pytest.param("mimo_v2_flash", (2, 1), "triton", marks=thorough),
        pytest.param("mimo_v2_flash", (2, 1), "native", marks=thorough),
    ],
    ids=str,
)
def test_every_back_end_reads_the_blocks_of_each_layer(
    model: str, base: tuple[int, int], name: str, rank_pool: Any, tmp_path: Path
) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    if name == "native" and not is_available("attention"):
        pytest.skip("no C compiler here")
    make_unequal(model, tmp_path)
    steps = STEPS // 3 if name == "triton" else STEPS  # the interpreter is slow
    results = rank_pool(base[0] * base[1]).run(compare, str(tmp_path), base, name, steps, timeout=SECONDS)
    for count, difference, replays in results[:1]:
        assert count > steps // 2
        assert difference < 1e-4
        assert (replays > steps // 4) == (name != "native")
    assert len({replays for *_, replays in results}) == 1
