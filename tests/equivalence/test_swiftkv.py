"""SwiftKV: a plain forward's tokens and log-probabilities in every mode, and the products that prompts save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.equivalence.cases import CROWD, INNER, TIGHT, WHOLE, Profile, check_case, layouts, parameters
from tests.equivalence.swiftkv import PlainSwiftKV, make_swiftkv_reference, swiftkv_config
from tests.equivalence.test_pooled_prompts import PROMPTS, pool
from tests.equivalence.tiny_models import NEW_TOKENS, Reference, make_checkpoint, make_prompts
from tests.model.quantization.checkpoints import FORMATS, change_config, make_quantised
from tests.worker.graphs.test_cpu_graphs import compare
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.cli.dry_run.gpus import find_gpu
from ulysses_infer.cli.dry_run.report import dry_run
from ulysses_infer.config import load_config
from ulysses_infer.errors import CheckpointError, ConfigError
from ulysses_infer.kernels.launch import assume
from ulysses_infer.model.model import read_config
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.sampling_params import POOLINGS
from ulysses_infer.worker.step import Step
from ulysses_infer.worker.step_plan import LAST_LOGITS, NO_LOGITS, PlanItem, StepPlan, logits_positions

MODELS: dict[str, dict[str, Any]] = {
    "own keys": {},
    "shared keys": {"num_hidden_layers": 5, "num_key_value_layers": 1, "key_value_group_size": 2},
    "padded": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "attention_bias": True},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """`reference(name)`: a tiny checkpoint of one of `MODELS` with a plain forward's answers."""
    return cache(lambda name: make_swiftkv_reference(tmp_path_factory.mktemp("swiftkv"), **MODELS[name]))


def cases() -> list[Any]:
    """The models on most bases with alternating profiles; one case by default."""
    chosen = []
    for turn, name in enumerate(MODELS):
        for number, base in enumerate(layouts(turn)):
            if name != "own keys" and base[0] == 1:
                continue
            profile = (CROWD, TIGHT, INNER if base == (2, 2) else CROWD, WHOLE, TIGHT)[(turn + number) % 5]
            chosen.append(parameters(name, base, profile, is_default=(name, base) == ("own keys", (2, 1))))
    return chosen


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "base", "profile"), cases())
def test_every_mode_gives_what_a_plain_forward_gives(
    name: str, base: tuple[int, int], profile: Profile, rank_pool: Any, reference: Callable[[str], Reference]
) -> None:
    expected = reference(name)
    check_case(rank_pool, expected, base, profile)


@pytest.mark.thorough
@pytest.mark.distributed
def test_recorded_decodes_are_those_of_single_layers(rank_pool: Any, reference: Callable[[str], Reference]) -> None:
    assert compare(rank_pool, reference("own keys"), (2, 1)) > 10


def run_quantised(rank_pool: Any, folder: Path, name: str, base: tuple[int, int], profile: Profile) -> None:
    model = PlainSwiftKV(make_quantised(swiftkv_config(), folder, FORMATS[name]))
    expected = model.reference(folder, make_prompts())
    check_case(rank_pool, expected, base, profile)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "base"),
    [("fp8-block", (4, 1)), ("compressed-channel", (2, 2)), ("compressed-int8", (2, 1)), ("gptq", (2, 1))],
)
def test_quantised_checkpoints(name: str, base: tuple[int, int], rank_pool: Any, tmp_path: Path) -> None:
    run_quantised(rank_pool, tmp_path, name, base, CROWD)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("base", [(2, 1), (2, 2)])
def test_drafted_tokens(base: tuple[int, int], rank_pool: Any, reference: Callable[[str], Reference]) -> None:
    expected = reference("own keys")
    profile = replace(CROWD, settings={"speculation": {"method": "ngram", "num_tokens": 3}})
    check_case(rank_pool, expected, base, profile)


def answers_with_adapter(folder: Path, adapter: Path, base: tuple[int, int], prompts: list[list[int]]) -> Any:
    """On every rank: the tokens of each prompt with the adapter and without, all in one batch."""
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    names = [name for _ in prompts for name in (None, "mine")]
    overrides = {**CROWD.overrides(base), "lora.adapters": {"mine": str(adapter)}}
    with init_inference(str(folder), **overrides) as engine:
        outputs = engine.generate([prompt for prompt in prompts for _ in range(2)], params, adapter=names)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("base", [(1, 1), (2, 1), (2, 2)])
def test_adapters(base: tuple[int, int], rank_pool: Any, tmp_path: Path) -> None:
    model = make_checkpoint(swiftkv_config(), tmp_path / "model")
    prompts = make_prompts()
    plain = PlainSwiftKV(model).reference(tmp_path, prompts).tokens
    targets = ["q_proj_swiftkv", "k_proj_swiftkv", "v_proj_swiftkv", "q_proj", "o_proj", "down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=64, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapted = PlainSwiftKV(wrapped.merge_and_unload()).reference(tmp_path, prompts).tokens
    assert adapted != plain
    expected = [tokens for pair in zip(plain, adapted, strict=True) for tokens in pair]
    ranks = rank_pool(base[0] * base[1])
    found = ranks.run(answers_with_adapter, tmp_path / "model", tmp_path / "adapter", base, prompts)
    assert found == [expected] * len(found)


PUBLISHED = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "num_key_value_layers": 4,
    "dtype": "bfloat16",
}
"""Llama-3.1-SwiftKV-8B-Instruct, with a quarter of its layers."""
PROMPT = 4096  # tokens


def products_of_prompt(folder: Path, logits: int, **changes: Any) -> int:
    """Floating-point operations of all matrix products of a step with a prompt, in one rank's own step."""
    swiftkv_config(**{**PUBLISHED, **changes}).save_pretrained(folder)
    change_config(folder, architectures=["LlamaSwiftKVForCausalLM"])
    overrides = {"model.path": str(folder), "runtime.enforce_eager": True, "scheduler.max_num_batched_tokens": PROMPT}
    gpu = find_gpu("h200")
    rank = dry_run(load_config(overrides), gpu).rank
    items = [PlanItem(0, 0, PROMPT, list(range(rank.worker.cache.shape.blocks_for(PROMPT))), logits)]
    plan = StepPlan(0, Mode(1, 1), items, np.ones(PROMPT, dtype=np.int32), [0], full_logits=True)
    step = Step(plan, rank.worker.tables.apply(plan), logits_positions(items), rank.worker.next_tokens)
    with assume("meta", gpu.capability), FlopCounterMode(display=False) as counter:
        rank.worker.eager.run(step, lambda logits: logits)
    return counter.get_total_flops()


def test_a_prompt_takes_half_the_products_of_a_model_without_swiftkv(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    width, neurons, keys = (PUBLISHED[name] for name in ("hidden_size", "intermediate_size", "num_key_value_heads"))
    query, keys, rest = width * width, 2 * width * 128 * keys, width * width + 3 * width * neurons
    own = 4 * (query + keys + rest)
    last = products_of_prompt(tmp_path, LAST_LOGITS)
    assert last == 2 * (PROMPT * (own + 4 * keys) + 4 * (query + rest) + width * PUBLISHED["vocab_size"])
    assert products_of_prompt(tmp_path, NO_LOGITS) == 2 * PROMPT * (own + 4 * keys)
    plain = products_of_prompt(tmp_path, LAST_LOGITS, num_key_value_layers=None)
    assert 0.45 < 1 - last / plain < 0.5


@pytest.mark.thorough
def test_decodes_are_captured_on_a_gpu_in_every_mode_and_prompts_are_not(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    swiftkv_config(**{**PUBLISHED, "num_hidden_layers": 4, "num_key_value_layers": 2}).save_pretrained(tmp_path)
    overrides = {"model.path": str(tmp_path), "parallel.sp": 8, "scheduler.max_num_seqs": 16}
    found = dry_run(load_config(overrides), find_gpu("h200"))
    assert {mode for mode, _ in found.rank.capturer.steps} == {Mode(8, 1), Mode(1, 8)}
    assert not found.rank.capturer.mixed
    assert found.prefills[Mode(8, 1)].exchanges == {"all-to-all": 10, "all-gather": 2}  # type: ignore[union-attr]


@pytest.mark.thorough
@pytest.mark.distributed
def test_vectors_of_prompts(rank_pool: Any, tmp_path: Path) -> None:
    plain = PlainSwiftKV(make_checkpoint(swiftkv_config(), tmp_path))
    states = [plain.hidden(prompt) for prompt in PROMPTS]
    expected = {"last": [s[-1] for s in states], "mean": [s.mean(0) for s in states], "cls": [s[0] for s in states]}
    changes = {"scheduler.max_num_batched_tokens": 7, "scheduler.max_num_seqs": 5}
    for found, _ in rank_pool(2).run(pool, str(tmp_path), 2, 1, changes):
        references = [vector for kind in POOLINGS for vector in expected[kind]]
        assert torch.allclose(torch.tensor(found), torch.stack(references), atol=1e-4)


@pytest.mark.parametrize("method", ["mtp", "eagle3"])
def test_heads_that_need_the_hidden_states_of_skipped_tokens_are_refused(method: str, tmp_path: Path) -> None:
    make_checkpoint(swiftkv_config(), tmp_path)
    chosen = {"method": method, "model": str(tmp_path) if method == "eagle3" else None}
    with pytest.raises(ConfigError) as failure:
        init_inference(str(tmp_path), **{**CROWD.overrides((1, 1)), "speculation": chosen})
    assert str(failure.value) == (
        f"speculation.method = {method!r}: prompts skip the later layers of model type 'llama_swiftkv', so that their "
        "tokens lack the hidden states that a head reads; use ngram, suffix or draft_model"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_key_value_layers": 7}, "num_key_value_layers = 7 must be at least 1 and at most num_hidden_layers = 6"),
        ({"num_key_value_layers": 0}, "num_key_value_layers = 0 must be at least 1 and at most num_hidden_layers = 6"),
        ({"key_value_group_size": 2}, "key_value_group_size = 2 must divide the 3 layers after the first 3"),
        ({"kv_sharing_map": {"4": 3}}, "kv_sharing_map is not supported"),
    ],
)
def test_configs_that_no_model_can_have_are_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    swiftkv_config().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError) as failure:
        read_config(tmp_path)
    assert reason in str(failure.value)
    assert "\n" not in str(failure.value)
