"""The table of memory per rank and placement, compared with the memory that loading takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.generate.tiny_configs import parts_of, shallow
from tests.equivalence.tiny_models import model_class
from tools.memory_table import draw, read_config, rows
from ulysses_infer.parallel.layout import Layout, Mode

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
GIB = 1 << 30
SLACK = 48 * MIB  # allocator, threads, module tree
REDUCED = {
    "qwen3-30b-a3b": {"hidden_size": 256, "num_hidden_layers": 2, "moe_intermediate_size": 256, "vocab_size": 1024},
    "llama-4-scout-17b-16e": {
        "hidden_size": 640,
        "num_hidden_layers": 2,
        "intermediate_size": 1024,
        "intermediate_size_mlp": 1024,
        "vocab_size": 1024,
        "pad_token_id": None,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
}
LOAD = """
import json, sys, threading, time, torch
from pathlib import Path
from ulysses_infer.config import ModelConfig
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode

folder, sp, tp, shard, placement = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]

def anonymous():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

layout, settings = Layout(Mode(sp, tp)), ModelConfig(path=folder)
plan = ModelBuilder.from_folder(Path(folder), settings, layout, shard, torch.device("cpu"), expert_placement=placement)
before = anonymous()
model = plan.load(fuse=False)
grown = anonymous() - before
print(json.dumps({"grown": grown, "weights": model.weight_bytes, "experts": plan.expert_bytes}))
"""


def reduced(name: str) -> Any:
    whole = read_config(ROOT / "configs" / "models" / f"{name}.json")
    real = whole.get_text_config(decoder=True)
    values = {key: value for key, value in real.to_dict().items() if key not in ("layer_types", "moe_layers")}
    text = type(real)(**{**values, **REDUCED[name]})
    towers = {part: shallow(config) for part, config in parts_of(whole).items() if config is not real}
    return text if whole is real else type(whole)(text_config=text, dtype="bfloat16", **towers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`checkpoint(name)`: a model of the real heads and experts and small widths, 200 MB or so of bfloat16."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            config = reduced(name)
            with torch.device("meta"):
                model = model_class(config).from_config(config, dtype=torch.bfloat16)
            made[name] = tmp_path_factory.mktemp(name)
            model.to_empty(device="cpu").save_pretrained(made[name])
        return made[name]

    return get


LOADED = [("qwen3-30b-a3b", Mode(8, 1)), ("llama-4-scout-17b-16e", Mode(4, 2))]


@pytest.mark.thorough
@pytest.mark.parametrize("placement", ["expert", "replicate", "width"])
@pytest.mark.parametrize(("name", "base"), LOADED)
def test_loading_takes_what_the_table_says(name: str, base: Mode, placement: str, checkpoint: Any) -> None:
    folder = checkpoint(name)
    planned = draw(reduced(name), Layout(base), 3, placement)
    command = [sys.executable, "-c", LOAD, str(folder), str(base.sp), str(base.tp), "3", placement]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    assert (measured["weights"], measured["experts"]) == (planned.weight_bytes, planned.expert_bytes)
    # What the file has as the rank keeps it stays mapped pages; nothing else, and nothing twice, is in memory.
    assert measured["grown"] < planned.weight_bytes + SLACK
    if name == "qwen3-30b-a3b":  # its experts are stacked from single tensors: memory of the rank's own
        assert measured["grown"] > 0.95 * planned.expert_bytes


def test_real_models_take_an_eighth_of_their_experts_where_ranks_own_them() -> None:
    config = read_config(ROOT / "configs" / "models" / "qwen3-30b-a3b.json")
    layout = Layout(Mode(8, 1))
    of = {placement: draw(config, layout, 0, placement) for placement in ("replicate", "expert", "width")}
    assert of["replicate"].expert_bytes == 54 * GIB  # 48 layers of 128 experts of 3 * 2048 * 768 in bfloat16
    assert of["expert"].expert_bytes == of["width"].expert_bytes == 54 * GIB // 8
    others = {plan.weight_bytes - plan.expert_bytes for plan in of.values()}
    assert len(others) == 1


def test_a_placement_that_is_impossible_is_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    config = reduced("qwen3-30b-a3b")
    config.moe_intermediate_size = 36
    assert [row.placement for row in rows(config, Layout(Mode(8, 1)))] == ["replicate", "expert"]
    assert "width is not possible" in capsys.readouterr().out
