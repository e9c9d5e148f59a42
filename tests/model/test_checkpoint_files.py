"""The files of a checkpoint folder: weights are chosen as transformers chooses them, broken files are named."""

import itertools
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import settings, tiny_config, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.loading.files import INDEX_NAME, NAMED_KEY, SINGLE_NAME, checkpoint_files
from ulysses_infer.model.loading.generation_config import load_generation_config
from ulysses_infer.model.loading.sources import find_checkpoint
from ulysses_infer.model.model import build_empty_model, read_config

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIN_INDEX = "pytorch_model.bin.index.json"
MIXED = [
    SINGLE_NAME,
    INDEX_NAME,
    *SHARDS,
    "pytorch_model.bin",
    BIN_INDEX,
    "consolidated.safetensors",
    "model.fp16.safetensors",
]


def fill(folder, names, config):
    """Empty files of these names; indexes name their shards."""
    folder.mkdir()
    for name in names:
        shards = SHARDS if name == INDEX_NAME else ["pytorch_model-00001-of-00001.bin"]
        index = {"metadata": {}, "weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)}}
        (folder / name).write_text(json.dumps(index) if name.endswith(".index.json") else "")
    (folder / "config.json").write_text(json.dumps(config))


def chosen_by_transformers(folder, config):
    """The files that `from_pretrained` reads; None if it refuses, or if they are gone or pickles."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    try:
        files, _ = _get_resolved_checkpoint_files(
            folder, None, None, None, None, False, transformers_explicit_filename=config.get(NAMED_KEY)
        )
    except (OSError, ValueError):
        return None
    names = [os.path.relpath(path, folder) for path in ([files] if isinstance(files, str) else files)]
    served = all(name.endswith(".safetensors") and (folder / name).is_file() for name in names)
    return names if served else None


@pytest.mark.parametrize("named", [None, SINGLE_NAME, "consolidated.safetensors", INDEX_NAME, "../x.safetensors", 7])
def test_the_weights_are_the_files_that_transformers_takes_of_every_mixture(named, tmp_path):
    config = {} if named is None else {NAMED_KEY: named}
    for number, chosen in enumerate(itertools.product([False, True], repeat=len(MIXED))):
        folder = tmp_path / str(number)
        fill(folder, itertools.compress(MIXED, chosen), config)
        expected = None if named == 7 else chosen_by_transformers(folder, config)
        if expected is None:
            with pytest.raises(CheckpointError) as caught:
                checkpoint_files(folder)
            assert "\n" not in str(caught.value)
        else:
            assert [os.path.relpath(path, folder) for path in checkpoint_files(folder)] == expected
            assert find_checkpoint(str(folder)).step is None


@pytest.mark.parametrize("shards", ["gone", "complete"])
def test_a_single_file_beside_a_stale_index_is_served(shards, tmp_path):
    old = tiny_llama(tmp_path / "old")
    old.save_pretrained(tmp_path / "old", max_shard_size="40KB")
    (tmp_path / "old" / SINGLE_NAME).unlink(missing_ok=True)
    new = {name: torch.roll(tensor, 1, 0) for name, tensor in old.state_dict().items()}
    old.load_state_dict(new)
    if shards == "gone":
        old.save_pretrained(tmp_path / "old")  # deletes the shards and leaves the index
    else:
        save_file({name: tensor.clone() for name, tensor in new.items()}, tmp_path / "old" / SINGLE_NAME)
    assert (tmp_path / "old" / INDEX_NAME).is_file()
    assert any((tmp_path / "old").glob("model-*.safetensors")) == (shards == "complete")
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with init_inference(str(tmp_path / "old"), **settings()) as engine:
        found = engine.generate([[3, 4, 5]], greedy)[0].outputs[0].token_ids
    want = old.eval().generate(torch.tensor([[3, 4, 5]]), do_sample=False, max_new_tokens=5, eos_token_id=None)
    assert found == want[0, 3:].tolist()


def test_a_folder_of_an_adapter_is_named_with_its_base_model(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(
        CheckpointError, match=r"is an adapter of PEFT, not a model; serve owner/base with lora\.adapters"
    ):
        find_checkpoint(str(tmp_path))


# -- configuration files -------------------------------------------------------------------------------------------

NO_OBJECTS = ["", "not json", "[]", "null", '"text"', '{"a": 1', b"\xff\xfe"]


@pytest.mark.parametrize("text", NO_OBJECTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_not_a_json_object_is_named_in_one_line(name, text, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=rf"/{name} cannot be read: .*; correct it or download it again$"):
        (read_config if name == "config.json" else load_generation_config)(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "abc"),
        ("dtype", []),
        ("model_type", {"a": 1}),
        ("auto_map", 7),
        ("num_attention_heads", 0),
        ("num_attention_heads", -1),
        ("hidden_size", "64"),
        ("hidden_size", 10**30),
        ("intermediate_size", -1),
        ("hidden_act", "abc"),
        ("head_dim", 0),
        ("head_dim", -1),
        ("rope_parameters", [1]),
        ("layer_types", "abc"),
    ],
)
def test_a_wrong_value_in_the_config_is_refused_in_one_line(key, value, tmp_path):
    values = {**tiny_config().to_dict(), key: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        build_empty_model(read_config(tmp_path), torch.float32)
    assert "\n" not in str(caught.value)
