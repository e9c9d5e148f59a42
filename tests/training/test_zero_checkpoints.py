"""DeepSpeed's training checkpoints are served directly, and as the folder that tools/zero_to_hf.py makes of them.

Trained for 20 steps, saved, converted, and generated from: the same tokens and log-probabilities as by the training
model's own forward.
"""

import argparse
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from tests.equivalence.cases import ModeShuffle, all_logprobs
from tests.equivalence.tiny_models import token_logprobs
from tests.tiny import settings, tiny_config, write_tokenizer
from tests.training.training import STEPS, training
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.loading.sources import find_checkpoint, open_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # scripts, not a package
from zero_to_hf import main as zero_to_hf

pytestmark = pytest.mark.distributed
PROMPTS = [[5], [7, 8, 9, 10, 11], [3] * 17]
NEW_TOKENS = 9
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0)
KINDS = {  # name: ZeRO stage, SP in training, tied embeddings, frozen parameters and two parameter groups
    "zero0": (0, 2, False, False),
    "zero1": (1, 2, True, True),
    "zero2": (2, 2, False, True),
    "zero3": (3, 2, True, True),
    "universal1": (1, 1, True, True),
    "universal2": (2, 1, True, False),
    "universal3": (3, 2, True, True),
}


def train(stage, sequence_parallel, tied, frozen, folder):
    """Train and save; the prompts completed by the training's own forward, their log-probabilities, the state dict."""
    with training(stage, sequence_parallel, tie_word_embeddings=tied, frozen=frozen) as trained:
        for _ in range(STEPS):
            trained.step()
        trained.engine.save_checkpoint(folder, tag="step20")
        texts = [trained.complete(prompt, NEW_TOKENS) for prompt in PROMPTS]
        logprobs = [trained.logprobs(text) for text in texts]
        return texts, logprobs, {name: tensor.numpy() for name, tensor in trained.weights().items()}


def generate(folder, sp, tp):
    """As `train`, by the engine, with the modes shuffled."""
    with init_inference(str(folder), **settings(sp, tp)) as engine:
        if engine.is_first:
            engine._engine.choose_mode = ModeShuffle(engine.config.parallel.available_modes)
        outputs = engine.generate(PROMPTS, GREEDY)
    return [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs], [all_logprobs(o) for o in outputs]


def check_state(source, state, tied):
    """The checkpoint has every tensor that the model had, and a tied head under both names as one."""
    assert set(source.keys()) == {*state, "lm_head.weight"}
    for name, values in state.items():
        torch.testing.assert_close(source.read(name, None), torch.from_numpy(values), rtol=0, atol=1e-7)
    head, embedding = (source.read(name, None) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert torch.equal(head, embedding) == tied


def to_universal(step, output):
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = {"input_folder": str(step), "output_folder": str(output), "strict": False, "keep_temp_folder": False}
    with redirect_stdout(StringIO()):
        main(argparse.Namespace(num_extract_workers=1, num_merge_workers=1, inject_missing_state=True, **arguments))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, training_ranks):
    """`saved(kind)`: the checkpoint's folder, and what `train` returned."""
    made = {}

    def get(kind):
        if kind not in made:
            stage, sequence_parallel, tied, frozen = KINDS[kind]
            run = tmp_path_factory.mktemp(kind)
            tiny_config(tie_word_embeddings=tied).save_pretrained(run)
            write_tokenizer(run)
            folder = run / "checkpoints"
            expected = training_ranks(2).run(train, stage, sequence_parallel, tied, frozen, str(folder))[0]
            if kind.startswith("universal"):
                universal = run / "checkpoints_universal"
                to_universal(folder / "step20", universal / "step20_universal")
                (universal / "latest_universal").write_text("step20_universal")
                folder = universal
            made[kind] = folder, expected
        return made[kind]

    return get


MORE = ("zero0", "zero1", "zero2", "universal1")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.thorough) if kind in MORE else kind for kind in KINDS]
)
def test_the_trained_model_generates_as_the_training_models_own_forward(kind, saved, rank_pool, tmp_path):
    folder, (texts, logprobs, state) = saved(kind)
    check_state(open_weights(folder), state, KINDS[kind][2])
    zero_to_hf([str(folder), str(tmp_path / "hf")])
    for source, sp, tp in ((folder, 2, 1), (tmp_path / "hf", 1, 2)):
        for found_texts, found in rank_pool(2).run(generate, source, sp, tp):
            assert found_texts == texts
            assert found == [pytest.approx(row, abs=1e-4) for row in logprobs]


def test_the_converted_folder_is_an_ordinary_one(saved, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, (texts, logprobs, _) = saved("zero3")
    zero_to_hf([str(folder / "step20"), str(tmp_path / "hf"), "--dtype", "bfloat16"])
    assert "in torch.bfloat16" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "hf", folder.parent))
    assert ours.encode("ab") == theirs.encode("ab")
    assert token_logprobs(model, torch.tensor([texts[1]])) == pytest.approx(logprobs[1], abs=0.1)


def test_the_tokenizer_is_found_with_the_config(saved):
    with init_inference(str(saved("zero1")[0]), **settings()) as engine:
        assert engine.generate("ab")[0].prompt_token_ids == engine.tokenizer.encode("ab")


def test_a_config_that_is_nowhere_near_is_asked_for_and_may_be_named(saved, tmp_path):
    folder, _ = saved("zero2")
    lonely = tmp_path / "a" / "b" / "c" / "d"
    shutil.copytree(folder, lonely)
    with pytest.raises(CheckpointError, match=r"without the config\.json of its model.*model\.hf_config"):
        init_inference(str(lonely), **settings())
    with pytest.raises(SystemExit, match=r"^zero_to_hf: .*without the config\.json"):
        zero_to_hf([str(lonely), str(tmp_path / "hf")])
    zero_to_hf([str(lonely), str(tmp_path / "hf"), "--config", str(folder.parent)])
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    with init_inference(str(lonely), **settings(**{"model.hf_config": str(folder.parent)})) as engine:
        assert engine.tokenizer is not None


def test_a_config_of_another_model_is_refused(saved, tmp_path):
    folder, _ = saved("zero2")
    tiny_config(intermediate_size=96).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp\.(down|gate|up)_proj"):
        init_inference(str(folder), **settings(**{"model.hf_config": str(tmp_path)}))
    with pytest.raises(SystemExit, match=r"does not fit its config\.json"):
        zero_to_hf([str(folder), str(tmp_path / "hf"), "--config", str(tmp_path)])


def test_a_lost_or_broken_file_is_one_line(saved, tmp_path):
    folder, _ = saved("zero1")
    shutil.copytree(folder.parent, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step20"
    lost = sorted(step.glob("*_optim_states.pt"))[1]
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: Expected 2 of"):
        init_inference(str(step), **settings())
    lost.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        init_inference(str(step), **settings())
    assert "\n" not in str(caught.value)


def test_the_latest_step_is_taken_and_one_that_is_not_there_is_named(saved, tmp_path):
    folder, _ = saved("zero1")
    assert find_checkpoint(str(folder)).step == folder / "step20"
    for tag, named in (("step7\n", "names 'step7'"), ("", "names ''")):
        (tmp_path / "latest").write_text(tag)
        with pytest.raises(CheckpointError, match=named):
            find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (1, "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "has LoRA adapters of PEFT.*up_proj"),
        (2, "model.norm.weight", "in 2 model-parallel parts"),
    ],
)
def test_checkpoints_that_cannot_be_joined_are_refused_in_one_line(files, name, message, tmp_path):
    for part in range(files):
        torch.save({"module": {name: torch.zeros(2)}}, tmp_path / f"mp_rank_0{part}_model_states.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        find_checkpoint(str(tmp_path)).open()
    assert "\n" not in str(caught.value)
