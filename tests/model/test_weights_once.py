"""One copy of the weights serves every mode: loading more modes, and running in them, takes no more memory."""

import gc
from pathlib import Path

import pytest
import torch

from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.config import ModelConfig
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode

CPU = torch.device("cpu")


def live_tensor_bytes():
    """Bytes of every storage a live tensor holds, each once."""
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter  # others, left alive by torch's own tracing, have no memory
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds and thing.device == CPU]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def own_memory_kib():
    """This process's anonymous memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0])


@pytest.mark.parametrize("base", [Mode(4, 1), Mode(2, 2)], ids=str)
@pytest.mark.parametrize("heads", [(8, 2), (9, 3)], ids=["dividing", "padded"])
def test_binding_every_mode_allocates_nothing(tmp_path, base, heads):
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 64 * heads[0]}
    tiny_llama(tmp_path, tokenizer=False, intermediate_size=2048, vocab_size=2048, **sizes)
    layout = Layout(base)
    model = ModelBuilder.from_folder(tmp_path, ModelConfig(path=str(tmp_path)), layout, 3, CPU).load()
    before, before_kib, bytes_before = live_tensor_bytes(), own_memory_kib(), model.weight_bytes
    assert bytes_before > 8 << 20
    for mode in layout.modes:
        model.injection.bind(layout.place(mode, 3))
        assert live_tensor_bytes() == before
    assert model.weight_bytes == bytes_before
    assert own_memory_kib() - before_kib < 1024


def weight_bytes(folder, base, modes):
    """On a rank: what `stats` reports after a step in each mode, and what the parameters really hold."""
    sp, tp = base
    shifting = {"parallel.modes": modes, "policy.name": "static"}
    with init_inference(folder, None, **settings(sp, tp, **shifting)) as engine:
        for mode in modes:
            engine.set_policy("static", mode=mode)
            engine.generate([3, 4, 5], SamplingParams(temperature=0, max_tokens=2))
        reported = engine.stats()["weight_bytes_per_rank"]
        held = sum(p.numel() * p.element_size() for p in engine._rank.worker.model.module.parameters())
    return reported, held


@pytest.mark.distributed
@pytest.mark.parametrize(("base", "modes"), [((2, 1), [[2, 1], [1, 2]]), ((4, 1), [[4, 1], [2, 2], [1, 4]])])
def test_enabling_shift_adds_no_weight_bytes(tmp_path, rank_pool, base, modes):
    tiny_llama(tmp_path)
    pool = rank_pool(base[0])
    alone = pool.run(weight_bytes, str(tmp_path), base, modes[:1])
    shifting = pool.run(weight_bytes, str(tmp_path), base, modes)
    assert shifting == alone
    assert shifting[0][0] == [held for _, held in shifting], "stats reports what the ranks hold"
