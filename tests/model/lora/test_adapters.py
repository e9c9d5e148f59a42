"""LoRA adapters made by PEFT, compared with PEFT: per request, in every mode, mixed in one batch."""

from __future__ import annotations

import json
import random
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.equivalence.tiny_models import make_checkpoint, make_prompts, make_reference, perturb
from tests.tiny import settings, tiny_config
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError, RequestError
from ulysses_infer.model.lora.adapter import read_adapter

NEW_TOKENS = 9
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "wide": {"r": 6, "lora_alpha": 9, "target_modules": ATTENTION + FEED_FORWARD},
    "narrow": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.mlp.down_proj": 5},
        "alpha_pattern": {"layers.1.mlp.down_proj": 1},
    },
}
ADAPTERS = [None, *SETTINGS]


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    """(model folder, adapter folders by name, PEFT's answers by name, None: the model's own)."""
    return make_adapted(tmp_path_factory.mktemp("lora"))


def make_adapted(root, **changes):
    """`adapted`, for a model with some sizes changed."""
    model = make_checkpoint(tiny_config(vocab_size=101, **changes), root / "model")
    prompts = make_prompts()
    folders, answers = {}, {None: make_reference(model, root, prompts, NEW_TOKENS)}
    for seed, (name, adapter) in enumerate(SETTINGS.items(), start=1):
        wrapped = peft.get_peft_model(
            type(model).from_pretrained(root / "model", dtype=torch.float32),
            peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **adapter),
        )
        perturb(torch.nn.ModuleDict({"lora": torch.nn.ModuleList(_low_rank_layers(wrapped))}), seed)
        wrapped.save_pretrained(root / name)
        folders[name] = str(root / name)
        merged = wrapped.merge_and_unload().eval()
        answers[name] = make_reference(merged, root, prompts, NEW_TOKENS)
    assert answers["wide"].tokens != answers[None].tokens != answers["narrow"].tokens
    return str(root / "model"), folders, answers


def _low_rank_layers(model):
    return [module for name, module in model.named_modules() if name.endswith(("lora_A.default", "lora_B.default"))]


def params():
    return SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)


def complete(folder, folders, prompts, adapters, sp, tp, changes):
    """Every prompt through every adapter, all in one batch, with a random mode in each step."""
    chosen = random.Random(3)
    with init_inference(folder, **settings(sp, tp, **{"lora.adapters": folders, **changes})) as engine:
        if engine.is_first:
            engine._engine.choose_mode = lambda _: chosen.choice(engine.config.parallel.available_modes)
        work = [(prompt, adapter) for prompt in prompts for adapter in adapters]
        outputs = engine.generate([p for p, _ in work], params(), adapter=[a for _, a in work])
        hits = engine.stats()["prefix_cache_hits"]
    first = [output.outputs[0] for output in outputs]
    return [(o.token_ids, [next(iter(entry.values())).logprob for entry in o.logprobs]) for o in first], hits


def check(found, prompts, answers):
    for index, (tokens, logprobs) in enumerate(found):
        prompt, name = index // len(ADAPTERS), ADAPTERS[index % len(ADAPTERS)]
        assert tokens == answers[name].tokens[prompt]
        expected = answers[name].logprobs[prompt][len(prompts[prompt]) - 1 :]
        assert logprobs == pytest.approx(expected, abs=2e-4)  # random adapters amplify the rounding of some tokens


@pytest.mark.distributed
@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
def test_requests_of_several_adapters_share_batches_with_correct_outputs(adapted, rank_pool, sp, tp):
    folder, folders, answers = adapted
    prompts = answers[None].prompts
    small = {"scheduler.max_num_batched_tokens": 7, "cache.enable_prefix_caching": False}
    changes = small if (sp, tp) in ((2, 1), (2, 2)) else {}
    results = rank_pool(sp * tp).run(complete, folder, folders, prompts, ADAPTERS, sp, tp, changes)
    for found, _ in results:
        check(found, prompts, answers)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize(("sp", "tp"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_adapters_of_heads_that_do_not_divide(tmp_path, rank_pool, sp, tp):
    folder, folders, answers = make_adapted(tmp_path, num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    prompts = answers[None].prompts
    for found, _ in rank_pool(sp * tp).run(complete, folder, folders, prompts, ADAPTERS, sp, tp, {}):
        check(found, prompts, answers)


def test_cached_prefixes_are_not_shared_between_adapters(adapted):
    folder, folders, answers = adapted
    prompts = [answers[None].prompts[-1]]
    changes = {"lora.adapters": folders, "scheduler.max_num_seqs": 1}
    with init_inference(folder, **settings(**changes)) as engine:
        for _ in range(2):
            for name in ADAPTERS:
                output = engine.generate(prompts, params(), adapter=name)[0]
                assert output.outputs[0].token_ids == answers[name].tokens[-1]
        hits = engine.stats()["prefix_cache_hits"]
    assert hits == 3 * (len(prompts[0]) - 1) // 4 * 4, "the second round of each hits what its first has cached"


def test_only_requests_for_unknown_adapters_fail(adapted):
    folder, folders, answers = adapted
    with init_inference(folder, **settings(**{"lora.adapters": folders})) as engine:
        with pytest.raises(RequestError, match="adapter 'other' is not loaded; loaded are: wide, narrow"):
            engine.generate([[5, 6]], params(), adapter="other")
        with pytest.raises(RequestError, match="2 adapters for 1 prompts"):
            engine.generate([[5, 6]], params(), adapter=["wide", "narrow"])
        output = engine.generate(answers[None].prompts[:1], params(), adapter="wide")[0]
        assert output.outputs[0].token_ids == answers["wide"].tokens[0]


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(adapted, tmp_path):
    """A copy of an adapter, with a changed configuration or changed tensors."""
    _, folders, _ = adapted

    def make(rename=lambda key: key, **changes):
        source = Path(folders["wide"])
        config = json.loads((source / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        tensors = load_file(source / "adapter_model.safetensors")
        save_file({rename(key): tensor for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json; give a folder that PEFT saved"):
        read_adapter("a", tmp_path)


def test_embeddings_of_an_adapter_are_refused(broken):
    with pytest.raises(CheckpointError, match=r"only LoRA of linear layers.*merge it"):
        read_adapter("a", broken(lambda key: key.replace("q_proj.lora_A", "q_proj.lora_embedding_A")))


def test_a_rank_that_the_config_does_not_say_is_refused(broken):
    with pytest.raises(
        CheckpointError, match=r"matrices of model\.layers.* have rank 6, but adapter_config.json says 8"
    ):
        read_adapter("a", broken(r=8))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_adapter_config_is_named(broken, text):
    folder = broken()
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read") as caught:
        read_adapter("a", folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused_with_the_layer_name(adapted, broken):
    folder, _, _ = adapted
    elsewhere = broken(lambda key: key.replace("layers.1.", "layers.7."))
    with pytest.raises(CheckpointError, match=r"changes model.layers.7.*, which this model does not have"):
        init_inference(folder, **settings(**{"lora.adapters": {"a": str(elsewhere)}}))
