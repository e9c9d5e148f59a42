"""An engine with a tier of host memory and disk below its cache."""

import os

import pytest
import torch

from tests.distributed.draft_heads import eagle3_checkpoint, frequent_model
from tests.distributed.test_draft_heads import check_drafts, recorded
from tests.engine.test_states import hybrid
from tests.equivalence.tiny_models import make_prompts
from tests.tiny import SHAPE, settings, tiny_config, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.config import load_config
from ulysses_infer.errors import ConfigError

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)
PROMPTS = make_prompts(SHAPE["vocab_size"] - 1, (37, 33, 40, 45))
KEYS = ("external_prefix_cache_hits", "kv_offload_store_bytes", "kv_offload_load_bytes", "kv_offload_disk_store_bytes")
TIGHT = {"cache.num_blocks": 24, "model.max_model_len": 64}
"""Blocks for one or two of the prompts."""


def opened(model, **changes):
    return init_inference(model, **settings(**{**TIGHT, **changes}))


def run(engine, prompts=PROMPTS):
    """Tokens and log-probabilities of the prompts, one after another."""
    outputs = [engine.generate([prompt], GREEDY)[0].outputs[0] for prompt in prompts]
    engine._engine.scheduler.allocator.assert_idle()
    return [(out.token_ids, list(map(logprob, out.token_ids, out.logprobs))) for out in outputs]


def logprob(token, entry):
    return entry[token].logprob


def check_same(found, expected):
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-5)


def test_evicted_prefixes_come_back_from_host_memory_and_disk(folder, tmp_path):
    with opened(folder, **{"cache.num_blocks": 16}) as engine:
        plain = run(engine)
        run(engine)
        assert engine.stats()["prefix_cache_hits"] == 0
        assert not any(key in engine.stats() for key in KEYS)
        block = engine._rank.worker.cache.shape.bytes_per_block
    disk = {"cache.offload_disk_bytes": 60 * block, "cache.offload_disk_folder": str(tmp_path)}
    for sizes in ({"cache.offload_host_bytes": 60 * block}, {"cache.offload_host_bytes": 4 * block, **disk}):
        with opened(folder, **{"cache.num_blocks": 16}, **sizes) as engine:
            check_same(run(engine), plain)
            assert engine.stats()["external_prefix_cache_hits"] == 0
            queries = engine.stats()["external_prefix_cache_queries"]
            assert queries == engine.stats()["prefix_cache_queries"] == sum(map(len, PROMPTS))
            check_same(run(engine), plain)
            stats = engine.stats()
            assert stats["external_prefix_cache_hits"] == 36 + 32 + 36 + 44
            assert stats["kv_offload_load_bytes"] == (9 + 8 + 9 + 11) * block
            assert stats["kv_offload_store_bytes"] >= stats["kv_offload_load_bytes"] - 16 * block
            assert (stats["kv_offload_disk_store_bytes"] > 0) == (len(sizes) > 1)
            assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_new_weights_sleep_resets_and_calibration_leave_no_old_block(folder, tmp_path):
    with opened(folder, **{"cache.offload_host_bytes": 1 << 20}) as engine:
        plain, tier = run(engine), engine._engine.scheduler.allocator.tier
        assert tier.host_usage > 0
        assert engine._engine.scheduler.allocator.reset_prefix_cache()
        assert tier.host_usage == 0
        check_same(run(engine), plain)
        mover = engine._rank.worker.offload
        for level in (1, 2):
            engine.sleep(level)
            assert mover.memory.host == []
            engine.wake_up()
            if level == 2:
                engine.update_weights(folder)
            hits = tier.stats.hits
            check_same(run(engine), plain)
            assert tier.stats.hits == hits, "what was kept is gone"
            check_same(run(engine), plain)
            assert tier.stats.hits > hits
        engine.calibrate(0.2)
        check_same(run(engine), plain)
        other = tiny_llama(tmp_path, tokenizer=False)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.9)
        engine.update_weights(other)
        assert tier.host_usage == 0
        hits = tier.stats.hits
        changed = run(engine)
        assert changed != plain
        assert tier.stats.hits == hits
        check_same(run(engine), changed)
        assert tier.stats.hits > hits


@pytest.mark.thorough
def test_snapshots_of_recurrent_states_come_back(tmp_path):
    model, prompts = hybrid(), make_prompts(lengths=(37, 33, 40, 45))
    few = {**TIGHT, "cache.state_snapshots": 2, "cache.state_snapshot_interval": 8, "cache.num_blocks": 16}
    with init_inference(model, **settings(**few)) as engine:
        plain = run(engine, prompts)
        assert engine.stats()["state_snapshot_hits"] == 0
    with init_inference(model, **settings(**few, **{"cache.offload_host_bytes": 4 << 20})) as engine:
        check_same(run(engine, prompts), plain)
        check_same(run(engine, prompts), plain)
        stats = engine.stats()
        assert stats["state_snapshot_hits"] == 4
        assert stats["external_prefix_cache_hits"] == 32 + 32 + 32 + 40
    with pytest.raises(ConfigError, match=r"model type 'qwen3_next' has recurrent states, and without snapshots"):
        init_inference(model, **settings(**{**few, "cache.state_snapshots": 0, "cache.offload_host_bytes": 4 << 20}))


@pytest.mark.thorough
def test_blocks_of_a_draft_head_come_back_with_those_of_the_model(tmp_path):
    """If they did not, drafts would differ from those of the description."""
    head = eagle3_checkpoint(frequent_model(tiny_config(num_hidden_layers=5), tmp_path), tmp_path / "head")
    chosen = {"speculation.method": "eagle3", "speculation.model": str(tmp_path / "head"), "speculation.num_tokens": 3}
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    texts = [text * 4 for text in ("the quick ", "brown fox ", "and the lazy dog ")]
    few = {"cache.num_blocks": 24, "model.max_model_len": 96, "cache.offload_host_bytes": 1 << 20}
    with init_inference(str(tmp_path), **settings(**chosen, **few)) as engine:
        rank, first = engine._rank, [engine.generate(text, params)[0].outputs[0].token_ids for text in texts]
        caches = rank.worker.cache.shape, rank.worker.drafter.cache.shape
        assert rank.worker.offload.sizes.slot_bytes == (sum(shape.bytes_per_block for shape in caches),)
        found = recorded(engine._engine)
        assert [engine.generate(text, params)[0].outputs[0].token_ids for text in texts] == first
        assert engine.stats()["external_prefix_cache_hits"] > 100
    check_drafts(found, head)


def wrong(**changes):
    return load_config({"model.path": "x", **{f"cache.{key}": value for key, value in changes.items()}})


def test_settings_that_cannot_work_are_refused_in_one_line(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"offload_host_bytes = 4096 .*enable_prefix_caching is false; use 0"):
        wrong(offload_host_bytes=4096, enable_prefix_caching=False)
    with pytest.raises(ConfigError, match=r"offload_host_bytes = -1 .*must be at least 0"):
        wrong(offload_host_bytes=-1)
    with pytest.raises(ConfigError, match=r"offload_disk_bytes = 4096 .*offload_host_bytes is 0; set it too"):
        wrong(offload_disk_bytes=4096)
    with pytest.raises(ConfigError, match=r"offload_disk_bytes = 4096 .*give cache\.offload_disk_folder"):
        wrong(offload_host_bytes=4096, offload_disk_bytes=4096)
    with pytest.raises(ConfigError, match=r"kv_offloading_size = 4 .*use cache\.offload_host_bytes, in bytes per rank"):
        load_config({"model.path": "x", "kv_offloading_size": 4})
    for sizes, message in (
        ({"offload_host_bytes": 100}, r"offload_host_bytes = 100 is less than one block .* bytes; raise it"),
        ({"offload_host_bytes": 1 << 60}, r"offload_host_bytes \d+ takes .* GiB of host memory are left per rank"),
        (
            {"offload_host_bytes": 1 << 16, "offload_disk_bytes": 1 << 16, "offload_disk_folder": f"{tmp_path}/no"},
            r"offload_disk_folder = '.*no' is not a folder",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            opened(folder, **{f"cache.{key}": value for key, value in sizes.items()})
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
