"""Loading of checkpoints in all formats: what is read, and which errors are raised."""

import json
import shutil

import pytest
import torch

from tests.equivalence.families import tiny_config as family_config
from tests.equivalence.tiny_models import make_checkpoint
from tests.tiny import settings, tiny_llama
from ulysses_infer import init_inference
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import CheckpointError, ConfigError, UlyssesError, UnsupportedModelError
from ulysses_infer.model.loading.files import INDEX_NAME, SINGLE_NAME, MemorySource, SafetensorsSource, checkpoint_files
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode, Span

CPU = torch.device("cpu")


class CountingSource:
    """Passes reads on and adds up the bytes that come back."""

    def __init__(self, source):
        self.source, self.bytes, self.largest = source, 0, 0

    def keys(self):
        return self.source.keys()

    def shape(self, key):
        return self.source.shape(key)

    def read(self, key, kept):
        tensor = self.source.read(key, kept)
        self.bytes += tensor.numel() * tensor.element_size()
        self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return tensor


SINGLE = Mode(1, 1)


def blueprint(folder, base=SINGLE, shard=0, **model):
    return ModelBuilder.from_folder(folder, ModelConfig(path=str(folder), **model), Layout(base), shard, CPU)


def load(folder, base=SINGLE, shard=0, **model):
    return blueprint(folder, base, shard, **model).load()


def counted(folder, base, shard):
    """A loaded rank and the source that it was read from."""
    source = CountingSource(SafetensorsSource(folder))
    plan = blueprint(folder, base, shard)
    plan.open_source = lambda: source
    return plan.load(), source


def refusal(folder, error=CheckpointError, **model):
    """The message that loading ends with: always one line."""
    with pytest.raises(error) as caught:
        load(folder, **model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def parameters(model):
    return dict(model.module.named_parameters())


# -- forms of a checkpoint -----------------------------------------------------------------------------------------


def test_a_single_file_gives_every_parameter(tmp_path):
    reference = tiny_llama(tmp_path, tokenizer=False).state_dict()
    loaded = parameters(load(tmp_path))
    assert loaded.keys() == reference.keys()
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)


def test_a_sharded_checkpoint_gives_the_same_as_a_single_file(tmp_path):
    model = tiny_llama(tmp_path / "single", tokenizer=False)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(checkpoint_files(tmp_path / "sharded")) > 3
    single, sharded = parameters(load(tmp_path / "single")), parameters(load(tmp_path / "sharded"))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_a_tied_head_is_stored_once(tmp_path):
    tiny_llama(tmp_path / "tied", tokenizer=False, tie_word_embeddings=True)
    tiny_llama(tmp_path / "untied", tokenizer=False)
    tied, untied = load(tmp_path / "tied"), load(tmp_path / "untied")
    head = 99 * 64 * 4
    assert untied.weight_bytes - tied.weight_bytes == head
    rows, embedding = tied.injection.head.rows(), tied.module.get_input_embeddings().weight
    assert rows.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)],
)
def test_weights_are_converted_to_the_requested_dtype(tmp_path, name, dtype):
    reference = tiny_llama(tmp_path, tokenizer=False).state_dict()
    loaded = load(tmp_path, dtype=name)
    assert loaded.dtype == dtype
    assert all(torch.equal(value, reference[key].to(dtype)) for key, value in parameters(loaded).items())


def test_auto_is_the_checkpoints_own_dtype(tmp_path):
    tiny_llama(tmp_path / "wide", tokenizer=False).to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    assert load(tmp_path / "narrow").dtype == torch.bfloat16


def test_buffers_are_not_cast(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    rotary = load(tmp_path, dtype="bfloat16").module.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32, "positions far out need the precision"


# -- slices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Mode(1, 2), Mode(2, 2), Mode(1, 4), Mode(4, 2)], ids=str)
def test_a_rank_reads_only_the_bytes_it_keeps(tmp_path, base):
    tiny_llama(tmp_path, tokenizer=False)
    full = sum(path.stat().st_size for path in checkpoint_files(tmp_path))
    replicated = (99 * 64 + 5 * 64) * 4  # input embedding and norms
    for shard in range(base.world_size):
        model, source = counted(tmp_path, base, shard)
        assert source.bytes == model.weight_bytes
        shared_heads = 2 * 2 * 64 * 8 * 4 if base.tp == 4 else 0  # one KV head on two ranks, two tensors per layer
        vocabulary = -(-99 // base.world_size) * 64 * 4
        assert source.bytes <= full / base.tp + replicated + vocabulary + shared_heads


def test_slices_of_all_ranks_together_are_the_checkpoint(tmp_path):
    reference = tiny_llama(tmp_path, tokenizer=False, num_key_value_heads=4).state_dict()
    layout = Layout(Mode(1, 4))
    ranks = [load(tmp_path, layout.base, shard) for shard in range(4)]
    for name, whole in reference.items():
        kept = ranks[0].injection.slices(name)
        parts = [parameters(rank)[name] for rank in ranks]
        together = parts[0] if kept is None else torch.cat(parts, dim=kept[0])
        assert torch.equal(together, whole), name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_sliced_as_they_are_read(tmp_path, family):
    make_checkpoint(family_config(family), tmp_path)
    whole, everything = counted(tmp_path, Mode(1, 1), 0)
    for shard in range(4):
        model, source = counted(tmp_path, Mode(1, 4), shard)
        experts = next(module for module in model.module.modules() if hasattr(module, "expert_layer"))
        layout = Layout(Mode(1, 4))
        assert experts.down_proj.numel() * 4 == _of(whole, experts).down_proj.numel()
        assert source.bytes < everything.bytes / 2, "stacked and joined from slices, not from whole tensors"
        assert source.bytes == model.weight_bytes
        assert layout.base == Mode(1, 4)


def _of(model, experts):
    return next(module for module in model.module.modules() if type(module) is type(experts))


def test_progress_counts_to_the_end(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    seen = []
    blueprint(tmp_path).load(lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1] == 21


@pytest.mark.parametrize("source_type", ["file", "memory"])
def test_sources_read_spans_in_order(tmp_path, source_type):
    from safetensors.torch import save_file

    whole = torch.arange(60.0).view(6, 10)
    if source_type == "file":
        save_file({"weight": whole}, tmp_path / SINGLE_NAME)
        source = SafetensorsSource(tmp_path)
    else:
        source = MemorySource({"weight": whole})
    assert torch.equal(source.read("weight", None), whole)
    assert torch.equal(source.read("weight", (0, [Span(1, 3)])), whole[1:3])
    assert torch.equal(source.read("weight", (1, [Span(0, 2), Span(7, 9)])), whole[:, [0, 1, 7, 8]])
    assert source.shape("weight") == (6, 10)


# -- errors --------------------------------------------------------------------------------------------------------


def test_a_missing_file_of_the_index_is_named(tmp_path):
    tiny_llama(tmp_path / "single", tokenizer=False).save_pretrained(tmp_path, max_shard_size="40KB")
    lost = checkpoint_files(tmp_path)[1]
    lost.unlink()
    message = refusal(tmp_path)
    assert "lacks 1 of" in message
    assert lost.name in message


def test_a_truncated_file_is_named(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    path = tmp_path / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(tmp_path)
    assert str(path) in message
    assert "truncated" in message


def test_an_empty_file_is_refused(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    (tmp_path / SINGLE_NAME).write_bytes(b"")
    assert SINGLE_NAME in refusal(tmp_path)


def test_a_broken_index_is_named(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    (tmp_path / SINGLE_NAME).unlink()
    for text in ('{"metadata": {}', '["weight_map"]', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / INDEX_NAME).write_text(text)
        assert INDEX_NAME in refusal(tmp_path)


def rewrite(folder, change):
    """Change the tensors of a single-file checkpoint."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refusal(tmp_path)
    assert "lacks 1 of 21 tensors" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.parametrize("rows", [87, 89])
def test_a_tensor_of_the_wrong_shape_is_named(tmp_path, rows):
    tiny_llama(tmp_path, tokenizer=False)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(rows, 64)}))
    for base in (Mode(1, 1), Mode(1, 2)):
        for shard in range(base.world_size):
            with pytest.raises(CheckpointError) as caught:
                load(tmp_path, base, shard)
            assert f"{name} has shape [{rows}, 64]" in str(caught.value)
            assert "[88, 64]" in str(caught.value)


@pytest.mark.parametrize("width", [31, 33])
@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_experts_of_the_wrong_width_are_named(tmp_path, width, part):
    make_checkpoint(family_config("qwen3_moe"), tmp_path)
    name = f"model.layers.0.mlp.experts.2.{part}.weight"
    shape = (width, 64) if part == "gate_proj" else (64, width)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    for base in (Mode(1, 1), Mode(1, 2)):
        with pytest.raises(CheckpointError, match=str(width)) as caught:
            load(tmp_path, base)
        assert "experts" in str(caught.value)


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert "config.json" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    (tmp_path / SINGLE_NAME).unlink()
    assert f"holds neither {SINGLE_NAME} nor {INDEX_NAME}" in refusal(tmp_path)


def test_old_torch_files_are_refused_with_the_remedy(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    (tmp_path / SINGLE_NAME).rename(tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_quantization_is_refused(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    change_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    message = refusal(tmp_path, UnsupportedModelError)
    assert "quantized by bitsandbytes" in message


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"model_type": "no_such_model"}'])
def test_an_unreadable_config_gives_a_one_line_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path)


def test_neither_folder_nor_hub_id_is_refused(tmp_path):
    for path in (str(tmp_path / "missing"), "./missing", "missing"):
        with pytest.raises(CheckpointError, match="is neither a folder nor a hub id"):
            init_inference(path, **settings())


def test_an_unavailable_hub_id_gives_a_one_line_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        init_inference("nobody/no-such-model", **settings())
    assert "nobody/no-such-model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_too_big_for_the_memory_is_refused_with_numbers_before_it_is_read(tmp_path, monkeypatch):
    from ulysses_infer.job import load_model

    tiny_llama(tmp_path)
    monkeypatch.setattr(load_model, "available_memory", lambda *_: 300_000)
    monkeypatch.setattr(ModelBuilder, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"the model does not fit: .* GiB"):
        init_inference(str(tmp_path), **settings())


# -- a model in memory ---------------------------------------------------------------------------------------------


def test_a_model_in_memory_is_read_without_copies(tmp_path):
    model = tiny_llama(tmp_path, tokenizer=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = ModelBuilder.from_pretrained(model, ModelConfig(path="-"), Layout(Mode(1, 2)), 1, CPU)
    loaded = plan.load()
    down = parameters(loaded)["model.layers.0.mlp.down_proj.weight"]
    assert down.untyped_storage().data_ptr() == model.model.layers[0].mlp.down_proj.weight.untyped_storage().data_ptr()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items()), "it stays as it is"


def test_weight_bytes_count_views_of_one_storage_each(tmp_path):
    """Training frameworks keep all parameters in one flat buffer."""
    model = tiny_llama(tmp_path, tokenizer=False)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    offset = 0
    for parameter in model.parameters():
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    loaded = ModelBuilder.from_pretrained(model, ModelConfig(path="-"), Layout(Mode(1, 1)), 0, CPU).load()
    assert loaded.weight_bytes == flat.numel() * 4


def test_the_budget_knows_the_bytes_before_they_are_read(tmp_path):
    tiny_llama(tmp_path, tokenizer=False)
    for base, shard in ((Mode(1, 1), 0), (Mode(2, 2), 3), (Mode(1, 4), 1)):
        plan = blueprint(tmp_path, base, shard)
        assert plan.weight_bytes == plan.load().weight_bytes


@pytest.mark.parametrize("thing", [3, object(), torch.nn.Linear(2, 2), ["a"]])
def test_other_objects_than_models_are_refused(thing):
    with pytest.raises(ConfigError, match=r"give a hub id, a folder or a transformers\.PreTrainedModel"):
        init_inference(thing, **settings())


def test_a_wrapped_model_is_unwrapped(tmp_path):
    class Wrapper:  # as deepspeed.DeepSpeedEngine and DistributedDataParallel are
        def __init__(self, module):
            self.module = module

    model = tiny_llama(tmp_path, tokenizer=False)
    with init_inference(Wrapper(model), **settings()) as engine:
        assert len(engine.generate([3, 4])[0].outputs[0].token_ids) > 0


def test_errors_are_errors_of_this_package():
    assert issubclass(CheckpointError, UlyssesError)


def test_a_checkpoint_can_be_removed_once_loaded(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(folder)
    with init_inference(str(folder), **settings()) as engine:
        before = engine.generate([5, 6, 7])[0].outputs[0].token_ids
        shutil.rmtree(folder)
        assert engine.generate([5, 6, 7])[0].outputs[0].token_ids[:1] == before[:1] or before
