"""Weights quantised while loading: the same engine as over a checkpoint that stores them so, in every mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ulysses_infer
from docs.generate import recorded_decodes
from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import CROWD, Profile, check, run_case, with_snapshots
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import NEW_TOKENS, make_checkpoint, make_prompts, make_reference
from tests.model.quantization.checkpoints import FORMATS, make_quantised
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.experts import is_experts
from ulysses_infer.model.quantization.layers import mark_online
from ulysses_infer.model.quantization.online import online_scheme
from ulysses_infer.model.quantization.scheme import MARK
from ulysses_infer.native.library import is_available
from ulysses_infer.parallel.layout import Span

NAMES = ("int8", "int4")
HYBRIDS = ("qwen3_next",)


def again_dense(scheme: Any, weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] after quantisation."""
    outputs, inputs = weight.shape
    return scheme.dequantise(scheme.quantise(weight), Span(0, outputs), Span(0, inputs))


def rounded_model(folder: Any, family: str, name: str, **changes: Any) -> Any:
    """A dense checkpoint in `folder`, and transformers' model of its weights after each whole matrix was quantised."""
    config = next(tiny_configs(family)) if family in HYBRIDS else tiny_config(family, **changes)
    model = make_checkpoint(config, folder)
    round_weights(model, name)
    return model


def round_weights(model: Any, name: str, has_quantised_head: bool = True) -> None:
    """Replace weights by those after quantisation. A head that is tied gets weights of its own."""
    head, scheme = model.get_output_embeddings(), online_scheme(name, 32)
    mark_online(model, scheme, online_scheme("int8", 0) if has_quantised_head else None)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, MARK):
                is_linear = type(module) is torch.nn.Linear
                weight = module.weight if is_linear else module.weight.t()
                weight.copy_(again_dense(getattr(module, MARK), weight))
            elif is_experts(module):
                for parameter in (module.down_proj, module.gate_up_proj):
                    for matrix in parameter:
                        matrix = matrix.t() if module.is_transposed else matrix
                        matrix.copy_(again_dense(scheme, matrix))


def online(profile: Profile, name: str, **settings: Any) -> Profile:
    return replace(profile, settings={"model.quantize": name, "model.quantize_group_size": 32, **settings})


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "name", "base"),
    [
        ("llama", "int8", (4, 1)),
        ("llama", "int4", (2, 2)),
        ("mixtral", "int4", (2, 1)),
        *(
            pytest.param(family, name, base, marks=pytest.mark.thorough)
            for turn, family in enumerate(("llama", "phi3", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"))
            for other, name in enumerate(NAMES)
            for base in ((1, 1), ((4, 1), (2, 2))[(turn + other) % 2])
        ),
    ],
)
def test_equals_transformers_with_rounded_weights(
    family: str, name: str, base: tuple[int, int], rank_pool: Any, tmp_path: Any
) -> None:
    expected = make_reference(rounded_model(tmp_path, family, name), tmp_path, make_prompts())
    profile = with_snapshots(online(CROWD, name), tmp_path)
    outcomes = rank_pool(base[0] * base[1]).run(run_case, tmp_path, base, profile, expected.prompts, NEW_TOKENS)
    check(outcomes, expected, profile, num_modes=sum(base[0] % sp == 0 for sp in range(1, base[0] + 1)))


def start(folder: Any, **overrides: Any) -> Any:
    given = {"runtime": {"threads_per_rank": 1, "device": "cpu"}, "model.max_model_len": 128, **overrides}
    return ulysses_infer.init_inference(str(folder), **given)


def tokens_of(engine: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    params = ulysses_infer.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, params, **options)]


@pytest.mark.parametrize("name", NAMES)
def test_new_weights_are_quantised_again(name: str, tmp_path: Any) -> None:
    prompts, (first, second) = make_prompts(), (tmp_path / "first", tmp_path / "second")
    before = make_reference(rounded_model(first, "llama", name), first, prompts)
    changed = make_checkpoint(tiny_config("llama"), second)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.copy_(parameter.flip(0))
    changed.save_pretrained(second)
    round_weights(changed, name)
    after = make_reference(changed, second, prompts)
    assert before.tokens != after.tokens
    with start(first, **online(CROWD, name).settings) as engine:
        assert tokens_of(engine, prompts) == before.tokens
        engine.update_weights(str(second))
        assert tokens_of(engine, prompts) == after.tokens


def test_an_adapter_is_added_to_quantised_weights(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model = rounded_model(tmp_path / "model", "llama", "int8")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, r=4, target_modules=["q_proj", "down_proj"]
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    prompts = make_prompts()
    expected = make_reference(wrapped.merge_and_unload().eval(), tmp_path, prompts)
    settings = online(CROWD, "int8").settings | {"lora.adapters": {"a": str(tmp_path / "adapter")}}
    with start(tmp_path / "model", **settings) as engine:
        assert tokens_of(engine, prompts, adapter="a") == expected.tokens


def test_decode_steps_in_bfloat16_are_recorded_and_equal_eager_ones(tmp_path: Any) -> None:
    make_checkpoint(tiny_config("llama"), tmp_path)
    found = []
    for eager in (True, False):
        overrides = online(CROWD, "int8").settings | {"model.dtype": "bfloat16", "runtime.enforce_eager": eager}
        with start(tmp_path, **overrides) as engine:
            found.append(tokens_of(engine, make_prompts()))
            graphs = engine._engine.worker.graphs
            assert eager or graphs._recorded
    assert found[0] == found[1]


@pytest.mark.skipif(not is_available("cpu_graph"), reason="no C compiler here")
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "int4"),
        pytest.param("mixtral", "int8", marks=pytest.mark.thorough),
        *(
            pytest.param(family, name, marks=pytest.mark.thorough)
            for family in ("qwen3_moe", "gpt_oss", "deepseek_v3")
            for name in NAMES
        ),
    ],
)
def test_decodes_of_quantised_experts_are_recorded(family: str, name: str, tmp_path: Any) -> None:
    prompts = make_prompts()
    expected = make_reference(rounded_model(tmp_path, family, name), tmp_path, prompts)
    tokens = [own[: recorded_decodes.NEW_TOKENS] for own in expected.tokens]
    changes = {"model.max_model_len": 128, "model.quantize": name, "model.quantize_group_size": 32}
    assert recorded_decodes.outcome(tmp_path, prompts, tokens, **changes) == "recorded"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 96), (13, 70), (8, 32)])
def test_each_weight_is_within_half_a_step(name: str, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs)
    scheme = online_scheme(name, 32)
    error = (again_dense(scheme, weight) - weight).abs()
    if name == "int8":
        assert (error <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    else:  # less of a group's range may be covered, if that makes its squared error smaller
        span = weight.abs().max() * 2
        assert error.max() <= span / 10
        assert error.square().mean() < (span / 15) ** 2 / 12


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_weight_is_quantised_as_its_copy(name: str) -> None:
    weight, scheme = torch.randn(64, 40), online_scheme(name, 32)
    copy = scheme.quantise(weight.t().contiguous())
    assert all(torch.equal(part, copy[leaf]) for leaf, part in scheme.quantise(weight.t()).items())


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_zero_stay_zero(name: str) -> None:
    assert not again_dense(online_scheme(name, 32), torch.zeros(8, 64)).any()


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Any) -> None:
    make_quantised(tiny_config("llama"), tmp_path, FORMATS["gptq"])
    with pytest.raises(ConfigError, match=r"model.quantize = 'int8': the checkpoint is quantised already, by gptq"):
        ulysses_infer.init_inference(str(tmp_path), {"model": {"quantize": "int8"}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int5"}, "choose from int8, int4"),
        ({"quantize": "int4", "quantize_group_size": 48}, "choose from 32, 64, 128; the nearest is"),
    ],
)
def test_unknown_values_are_refused_in_one_line(settings: Any, message: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ulysses_infer.init_inference(str(tmp_path), {"model": settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("has_quantised_head", [True, False])
def test_a_head_is_quantised_if_it_is_to_be_and_a_tied_embedding_stays(
    is_tied: bool, has_quantised_head: bool, tmp_path: Any
) -> None:
    config = tiny_config("llama", tie_word_embeddings=is_tied)
    model, prompts = make_checkpoint(config, tmp_path), make_prompts()
    embedding = model.get_input_embeddings().weight.detach().clone()
    round_weights(model, "int8", has_quantised_head)
    expected = make_reference(model, tmp_path, prompts)
    with start(tmp_path, **online(CROWD, "int8", **{"model.quantize_head": has_quantised_head}).settings) as engine:
        assert tokens_of(engine, prompts) == expected.tokens
        injected = engine._rank.worker.model.injection
        assert torch.equal(injected.model.get_input_embeddings().weight, embedding)
        assert (injected.head.stored is not None) == has_quantised_head
