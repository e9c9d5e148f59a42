"""Recurrent layers with what other layers have: quantised weights, adapters, new weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import CROWD, ModeShuffle, check, run_case, with_snapshots
from tests.equivalence.tiny_models import make_checkpoint, make_prompts, make_reference, perturb
from tests.model.quantization.checkpoints import FORMATS, make_quantised
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError

pytestmark = pytest.mark.distributed
KIND = "qwen3_next"
PROMPTS = make_prompts(lengths=(2, 13, 21))
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROJECTIONS = {
    KIND: ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"],
    "bamba": ["in_proj", "out_proj", "q_proj"],
    "kimi_linear": ["f_b_proj", "b_proj", "g_b_proj", "k_proj", "o_proj"],
    "lfm2": ["in_proj", "out_proj", "q_proj"],
    "minimax": ["qkv_proj", "output_gate", "out_proj"],
}


def config(kind: str = KIND) -> Any:
    return next(tiny_configs(kind))


QUANTISED = [
    ("fp8-block", KIND),
    *(
        pytest.param(name, kind, marks=pytest.mark.thorough)
        for name, kind in (("gptq", KIND), ("fp8-block", "bamba"), ("gptq", "bamba"), ("fp8-block", "lfm2"))
    ),
]


@pytest.mark.parametrize(("name", "kind"), QUANTISED)
def test_quantised_projections(name: str, kind: str, rank_pool: Any, tmp_path: Path) -> None:
    dense = config(kind)
    if kind == KIND:
        dense.mlp_only_layers = list(range(dense.num_hidden_layers))
    model = make_quantised(dense, tmp_path, FORMATS[name])
    expected = make_reference(model, tmp_path, make_prompts())
    profile = with_snapshots(CROWD, tmp_path)
    outcomes = rank_pool(2).run(run_case, tmp_path, (2, 1), profile, expected.prompts, 9)
    check(outcomes, expected, profile, num_modes=2)


def make_adapted(kind: str, root: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Save a model and an adapter of its recurrent layers; returns transformers' tokens without and with it."""
    model = make_checkpoint(config(kind), root / "model")
    plain = make_reference(model, root, PROMPTS, GREEDY.max_tokens).tokens
    settings = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS[kind]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    low_rank = [each for name, each in wrapped.named_modules() if name.endswith(("lora_A.default", "lora_B.default"))]
    perturb(torch.nn.ModuleList(low_rank), 1)
    wrapped.save_pretrained(root / "adapter")
    return plain, make_reference(wrapped.merge_and_unload().eval(), root, PROMPTS, GREEDY.max_tokens).tokens


def complete(root: Path, sp: int, tp: int) -> list[list[list[int]]]:
    """On a rank: the prompts without and with the adapter, in one batch, with a random mode in each step."""
    chosen = random.Random(0)
    changes: dict[str, Any] = {"scheduler.max_num_batched_tokens": 7, "model.max_model_len": 128}
    changes["lora.adapters"] = {"adapter": str(root / "adapter")}
    with init_inference(str(root / "model"), **settings(sp, tp, **changes)) as engine:
        if engine.is_first:
            engine._engine.choose_mode = lambda _: chosen.choice(engine.config.parallel.available_modes)
        adapters = [None, "adapter"] * len(PROMPTS)
        outputs = engine.generate([p for p in PROMPTS for _ in range(2)], GREEDY, adapter=adapters)
    tokens = [output.outputs[0].token_ids for output in outputs]
    return [tokens[0::2], tokens[1::2]]


@pytest.mark.parametrize(
    "kind", [each if each == KIND else pytest.param(each, marks=pytest.mark.thorough) for each in PROJECTIONS]
)
def test_adapters_of_recurrent_layers(kind: str, tmp_path: Path, rank_pool: Any) -> None:
    plain, adapted = make_adapted(kind, tmp_path)
    assert plain != adapted
    assert rank_pool(2).run(complete, tmp_path, 2, 1) == [[plain, adapted]] * 2


def test_adapters_of_what_is_inside_are_refused(tmp_path: Path) -> None:
    """Those of Mamba's x_proj, which a rank applies to its own channels."""
    model = make_checkpoint(config("mamba"), tmp_path / "model")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["x_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"'inner' changes .*x_proj.*, which is inside a recurrent layer"):
        init_inference(
            str(tmp_path / "model"), **settings(1, 1, **{"lora.adapters": {"inner": str(tmp_path / "adapter")}})
        )


def change_weights(first: str, second: str, base: tuple[int, int]) -> list[list[list[int]]]:
    """On a rank: tokens by the weights of one folder, then of the other and back, asleep in between."""
    with init_inference(first, **CROWD.overrides(base)) as engine:
        if engine.is_first:
            engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
        found = []
        for source, level in ((second, 1), (first, 2)):
            found.append([output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)])
            engine.sleep(level)
            engine.update_weights(source)
            engine.wake_up()
        return [*found, [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]]


@pytest.mark.parametrize(
    "kind",
    [
        KIND,
        *(
            pytest.param(kind, marks=pytest.mark.thorough)
            for kind in ("mamba", "zamba2", "minimax", "kimi_linear", "lfm2")
        ),
    ],
)
def test_new_weights(kind: str, tmp_path: Path, rank_pool: Any) -> None:
    folders = [tmp_path / str(seed) for seed in (0, 1)]
    models = [make_checkpoint(config(kind), folder, seed) for seed, folder in enumerate(folders)]
    by_first, by_second = (make_reference(m, tmp_path, PROMPTS, GREEDY.max_tokens).tokens for m in models)
    assert by_first != by_second
    for found in rank_pool(2).run(change_weights, *map(str, folders), (2, 1)):
        assert found == [by_first, by_second, by_first]
