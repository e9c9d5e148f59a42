"""tools/cache_table.py: what Gemma 4 31B and DeepSeek-V3.2 cache, by the loader's budget, on fewer layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.cache_table import MODELS, measure, render
from ulysses_infer.cli.dry_run.gpus import find_gpu

LAYERS = 6  # one period: five layers with windows, one that keeps all tokens
BLOCK = 16


def test_windows_limit_what_a_request_holds(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    values = json.loads((MODELS / "gemma-4-31b.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "num_hidden_layers": LAYERS}))
    table = measure(path, 8, 1, find_gpu("h200"))
    layer = 2 * 1024  # bytes: 2 heads of 256 with windows, or 1 of 512; keys and values in bfloat16
    assert (table.per_token, table.per_long_token) == (2 * layer * LAYERS // 2, layer)
    assert (table.full_per_token, table.states) == (layer * LAYERS, 0)
    for row in table.rows:
        windows = (1024 // BLOCK + 1) * BLOCK  # a window may begin and end anywhere in its blocks
        assert row.request == layer * (row.length + (LAYERS - 1) * windows)
        assert row.full == layer * LAYERS * row.length
        assert row.requests == table.cache // row.request > row.full_requests
    assert len(list(render("gemma", table))) > len(table.rows)


def test_latents_and_index_keys_take_less_than_heads(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    values = json.loads((MODELS / "deepseek-v3.2.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "num_hidden_layers": 2, "first_k_dense_replace": 2}))
    table = measure(path, 8, 1, find_gpu("h200"))
    assert table.per_token == table.per_long_token == 2 * 2 * (512 + 64 + 128)
    assert table.full_per_token == 2 * 2 * 128 // 8 * (128 + 64 + 128)


def test_states_take_the_place_of_most_keys_and_values(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    values = json.loads((MODELS / "qwen3-next-80b-a3b.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "num_hidden_layers": 4, "num_experts": 16}))
    table = measure(path, 8, 1, find_gpu("h200"))
    assert table.per_token == table.per_long_token == 2 * 2 * 256, "one KV head in one layer of four"
    assert table.full_per_token == 4 * table.per_token
    delta = 32 // 8 * 128 * 128 * 4  # the value heads of a rank, in float32
    convolution = (2 * 16 * 128 + 32 * 128) // 8 * 4 * 2
    assert table.states == 3 * (delta + convolution)
    for row in table.rows:
        assert row.request == table.states + row.length * table.per_token
