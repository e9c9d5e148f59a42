"""The KV cache tensors of one rank, and the memory budget."""

import pytest
import torch

from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.budget import MemoryBudget, activation_bytes, cache_bytes, check_weights_fit
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.paged import CacheShape, PagedCache
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.config import CacheConfig
from ulysses_infer.errors import ConfigError

SHAPE = CacheShape.uniform(3, 2, key_width=8, value_width=6, block_size=4, dtype=torch.float32)
CPU = torch.device("cpu")


def test_a_token_is_read_where_it_was_written():
    cache = PagedCache(SHAPE, num_blocks=5, device=CPU)
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    cache.write(1, torch.tensor([17, 0, 6]), key, value)
    read_key, read_value = cache.read(1, torch.tensor([17, 0, 6]))
    assert torch.equal(read_key, key)
    assert torch.equal(read_value, value)
    assert torch.equal(cache.keys[1][4, 1], key[0]), "slot 17 is offset 1 of block 4"


def test_a_write_changes_only_its_layer_and_slots():
    cache = PagedCache(SHAPE, num_blocks=5, device=CPU)
    for layer in range(3):
        cache.keys[layer].zero_()
        cache.values[layer].zero_()
    cache.write(1, torch.tensor([6]), torch.ones(1, 2, 8), torch.ones(1, 2, 6))
    assert [int(keys.sum()) for keys in cache.keys] == [0, 16, 0]
    assert [int(values.sum()) for values in cache.values] == [0, 12, 0]
    assert cache.keys[1][1, 2].eq(1).all()


def test_values_are_stored_in_the_caches_own_dtype():
    shape = CacheShape.uniform(1, 1, 4, 4, 2, torch.bfloat16)
    cache = PagedCache(shape, 2, CPU)
    cache.write(0, torch.tensor([3]), torch.full((1, 1, 4), 1.001), torch.full((1, 1, 4), 2.0))
    key, _ = cache.read(0, torch.tensor([3]))
    assert key.dtype == torch.bfloat16


def test_bytes_are_those_of_the_tensors():
    cache = PagedCache(SHAPE, num_blocks=5, device=CPU)
    held = sum(tensor.numel() * tensor.element_size() for tensor in [*cache.keys, *cache.values])
    assert cache.num_bytes == held == 5 * SHAPE.bytes_per_block


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_are_rounded_up(tokens, blocks):
    assert SHAPE.blocks_for(tokens) == blocks


def test_layers_have_the_blocks_of_their_group():
    groups = CacheGroups((AttentionSpan(), AttentionSpan(5)), (1, 0, 1))
    cache = PagedCache(SHAPE, (7, 3), CPU, scratch_blocks=1, groups=groups)
    assert [len(keys) for keys in cache.keys] == [len(values) for values in cache.values] == [4, 8, 4]
    assert (cache.num_blocks, cache.scratch_block(0), cache.scratch_block(1)) == (7, 7, 3)
    assert cache.num_bytes == (3 + 7 + 3) * SHAPE.bytes_per_block // 3


BUDGET = MemoryBudget(available=10_000_000, weights=6_000_000, activations=1_000_000)
SIZING = CacheSizing(SHAPE, CacheGroups.single(3), max_model_len=28, max_num_seqs=1, max_num_batched_tokens=16)


def test_the_cache_may_take_what_is_left():
    assert cache_bytes(CacheConfig(), SIZING, BUDGET, on_cpu=True) == 3_000_000
    plenty = MemoryBudget(10 << 30, 0, 0)
    assert cache_bytes(CacheConfig(), SIZING, plenty, on_cpu=True) == 4 << 30
    assert cache_bytes(CacheConfig(), SIZING, plenty, on_cpu=False) == 10 << 30


def test_a_configured_cache_size_is_used_or_refused():
    assert cache_bytes(CacheConfig(num_blocks=11), SIZING, BUDGET, on_cpu=True) == 11 * SHAPE.bytes_per_block
    assert cache_bytes(CacheConfig(memory_bytes=20_001), SIZING, BUDGET, on_cpu=True) == 20_001
    for config in (CacheConfig(num_blocks=10**6), CacheConfig(memory_bytes=3_000_001)):
        with pytest.raises(ConfigError, match=r"cache\.(num_blocks|memory_bytes) .* are left"):
            cache_bytes(config, SIZING, BUDGET, on_cpu=True)


def test_weights_that_do_not_fit_are_refused_with_the_numbers():
    check_weights_fit(BUDGET)
    with pytest.raises(ConfigError, match=r"the model does not fit: 1\.00 GiB available per rank, weights 1\.50 GiB"):
        check_weights_fit(MemoryBudget(1 << 30, 3 << 29, 0))


def test_activations_grow_with_tokens_and_rows():
    small = activation_bytes(100, 64, 128, 1000, 8, 2)
    assert activation_bytes(200, 64, 128, 1000, 8, 2) > small
    assert activation_bytes(100, 64, 128, 1000, 16, 2) == small + 8 * 1000 * 4
