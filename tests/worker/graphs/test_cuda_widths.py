"""Two layers of the recipes' models in their true widths on device `meta`, with 8 ranks in SP and TP mode.

Torch's own rules for the products of CUDA apply there, so a wrong dtype, stride or alignment is an error.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from benchmarks.recipe_models import recipe_path, write_config
from tests.worker.graphs.capturing import MEMORY, MIXED, capture, run_step
from ulysses_infer.attention.selection import choose
from ulysses_infer.cli.dry_run.config_only import read_config_only
from ulysses_infer.cli.dry_run.meta_rank import META, MetaRank
from ulysses_infer.config import choose_for_device, load_config
from ulysses_infer.job.make_worker import attention_needs
from ulysses_infer.kernels.launch import assume
from ulysses_infer.model.quantization.products import BlockScaledProduct, Piece, RowScaledProduct
from ulysses_infer.model.quantization.scaled import ScaledWeight
from ulysses_infer.parallel.layout import Mode, Span

LLAMA, QWEN, SCOUT = "llama-3.3-70b-fp8-8xh200", "qwen3-32b-fp8-8xh200", "llama-4-scout-17b-16e-8xh200"
EXPERTS = "qwen3-30b-a3b-8xh200"
MODES = (Mode(8, 1), Mode(1, 8))


class Model(NamedTuple):
    """A recipe, and how its model differs."""

    recipe: str
    quantised: bool = True
    cache: str = "auto"


MODELS = {
    "llama 70b fp8": Model(LLAMA),
    "llama 70b bfloat16": Model(LLAMA, quantised=False),
    "qwen3 32b fp8 blocks": Model(QWEN),
    "scout": Model(SCOUT),
    "scout, fp8 cache": Model(SCOUT, cache="fp8"),
    "qwen3 30b a3b": Model(EXPERTS),
}


@pytest.fixture(params=MODELS)
def rank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MetaRank]:
    model = MODELS[request.param]
    folder = write_config(model.recipe, tmp_path, layers=2)
    adapt(folder, model)
    with assume("meta", (9, 0)):
        yield make_rank(model, folder)


def adapt(folder: Path, model: Model) -> None:
    """Change config.json: as `model` says, and of llama4 one layer with chunks and one without positions."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    if not model.quantised:
        del values["quantization_config"]
    if model.recipe == SCOUT:
        text = values.get("text_config", values)
        text |= {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
    path.write_text(json.dumps(values))


def make_rank(model: Model, folder: Path) -> MetaRank:
    few = ["scheduler.max_num_seqs=8", "runtime.enforce_eager=false", f"cache.dtype={model.cache}"]
    shape = ["parallel.sp=8", "parallel.tp=1", "parallel.modes=[[8, 1], [1, 8]]"]
    config = load_config(recipe_path(model.recipe), [f"model.path={folder}", *few, *shape])
    choose_for_device(config, "cuda")
    return MetaRank(config, read_config_only(config.model), MEMORY)


def test_decodes_can_be_captured_and_mixed_steps_run(rank: MetaRank) -> None:
    capturer = capture(rank, max_rows=8)

    assert capturer.kept == []
    assert all(run_step(rank, mode, MIXED, eager=True).shape[0] == 4 for mode in MODES)
    needs = attention_needs(rank.model, rank.worker.cache.shape, META)
    for capability in ((8, 0), (9, 0), (10, 0)):
        choice = choose("auto", dataclasses.replace(needs, capability=capability), {"triton", "torch"})
        assert choice.name == "triton"


@pytest.mark.parametrize("grain", ["channel", "block"])
def test_a_wrong_stride_of_a_weight_is_noticed(grain: str) -> None:
    block = (128, 128) if grain == "block" else None
    scheme = ScaledWeight("scale", grain, block)
    product = BlockScaledProduct(scheme) if grain == "block" else RowScaledProduct(scheme)
    scale = torch.empty((4, 4) if block else (512, 1), device=META)
    weight, inputs = torch.empty(512, 512, device=META), torch.empty(8, 512, dtype=torch.bfloat16, device=META)
    with assume("meta", (9, 0)):
        for view, is_right in ((weight, True), (weight.t(), False)):
            parts = {"weight": view.to(torch.float8_e4m3fn), "scale": scale}
            piece = Piece(Span(0, 512), Span(0, 512), {}, parts, None)
            if is_right:
                assert product(inputs, piece).shape == (8, 512)
            else:
                with pytest.raises(RuntimeError, match="col_major"):
                    product(inputs, piece)


def test_a_wrong_width_of_grouped_experts_is_noticed() -> None:
    tokens, experts = torch.empty(8, 250, dtype=torch.bfloat16, device=META), torch.empty(4, 512, 250, device=META)
    offsets = torch.empty(4, dtype=torch.int32, device=META)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        F.grouped_mm(tokens, experts.bfloat16().transpose(1, 2), offs=offsets)
