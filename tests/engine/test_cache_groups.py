"""An engine whose layers have different attention spans: blocks taken and freed, calibration, error messages."""

import pytest

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint, make_prompts
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import ConfigError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Of two layers, one sees everything, the other 6 tokens."""
    made = tmp_path_factory.mktemp("gemma3")
    make_checkpoint(tiny_config("gemma3_text"), made)
    return str(made)


def opened(folder, **changes):
    return init_inference(folder, **settings(**{"scheduler.max_num_batched_tokens": 16, **changes}))


def tokens(engine, prompts):
    return [output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY)]


def test_blocks_are_freed_in_every_group_and_sleep_changes_nothing_else(windows):
    prompts = make_prompts(lengths=(60, 9, 30))
    with opened(windows, **{"cache.num_blocks": 200, "scheduler.max_num_seqs": 4}) as engine:
        allocator, cache = engine._engine.scheduler.allocator, engine._rank.worker.cache
        assert cache.blocks_of_groups == (200, 4 * (3 + 2) + 4)
        assert cache.num_bytes < 200 * cache.shape.bytes_per_block
        found = tokens(engine, prompts)
        allocator.assert_idle()
        assert tokens(engine, prompts) == found
        assert engine.stats()["prefix_cache_hits"] > 0
        engine.sleep(1)
        engine.wake_up()
        hits = engine.stats()["prefix_cache_hits"]
        assert tokens(engine, prompts) == found
        assert engine.stats()["prefix_cache_hits"] == hits, "nothing is cached in any group"
        assert (engine.stats()["num_blocks"], engine.stats()["kv_cache_usage_perc"]) == (200, 0.0)


def test_calibration_takes_blocks_of_every_group_and_frees_them(windows):
    prompts = make_prompts(lengths=(60, 9))
    with opened(windows) as engine:
        found = tokens(engine, prompts)
        assert engine.calibrate(0.5).measurements
        engine._engine.scheduler.allocator.assert_idle()
        assert tokens(engine, prompts) == found


def test_a_long_text_needs_less_memory_than_with_one_table_for_all(windows):
    """128 tokens are 32 blocks; the layer with a window holds 7 of them at most."""
    with opened(windows) as engine:
        per_layer = engine._rank.worker.cache.shape.bytes_per_block // 2
    enough = {"cache.num_blocks": None, "cache.memory_bytes": 39 * per_layer}
    with opened(windows, **enough) as engine:
        assert engine._rank.worker.cache.blocks_of_groups == (32, 7)
        assert len(tokens(engine, make_prompts(lengths=(119, 119)))[1]) == 8
        engine._engine.scheduler.allocator.assert_idle()
    with pytest.raises(ConfigError, match=rf"raise cache\.memory_bytes to at least {39 * per_layer} or lower"):
        opened(windows, **{**enough, "cache.memory_bytes": 39 * per_layer - 1})
