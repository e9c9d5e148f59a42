"""Norm, rotary embedding and the writes of heads in one kernel equal torch's operations one after another."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import use_exact_rounding
from ulysses_infer.cache.paged import CacheShape, PagedCache
from ulysses_infer.kernels import cache as cache_kernels
from ulysses_infer.kernels.heads import place_heads
from ulysses_infer.kernels.placement import HeadNorm, HeadTarget, HeadTemperature
from ulysses_infer.model.fusion.torch_elementwise import TorchElementwise
from ulysses_infer.model.layers.temperature import Temperature

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = 3


@pytest.fixture(autouse=True)
def _exact() -> None:
    use_exact_rounding()


def make_cache(dtype: torch.dtype, heads: int, width: int, device: str = "cpu") -> PagedCache:
    return PagedCache(CacheShape.uniform(1, heads, width, width, 4, dtype), 3, torch.device(device))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
    if expected.itemsize == 1:
        tolerance = 0.13  # one step of FP8
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance / 10)


def reference(query, key, norms, cosine, sine, width):
    torch_ops = TorchElementwise(query.dtype)
    query, key = (x.reshape(len(x), -1, width) for x in (query, key))
    query, key = (
        x if norm is None else torch_ops.rms_norm(x, norm.weight, norm.eps)
        for x, norm in zip((query, key), norms, strict=True)
    )
    return torch_ops.apply_rotary(query, key, cosine, sine)


def make_inputs(dtype, heads, kv_heads, width, rotated, shards=1, normed=True):
    torch.manual_seed(heads + width)
    whole = torch.randn(TOKENS, shards, (heads + 2 * kv_heads) // shards * width).to(dtype)
    query, key, value = whole.split([n // shards * width for n in (heads, kv_heads, kv_heads)], dim=-1)
    angles = torch.rand(TOKENS, rotated // 2).repeat(1, 2) * 6
    norm = HeadNorm((torch.rand(width) + 0.5).to(dtype), 1e-6) if normed else None
    return query, key, value, (norm, norm), angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(16, 16), (16, 4), (24, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_written_into_the_cache(dtype, width, rotated, normed) -> None:
    query, key, value, norms, cosine, sine = make_inputs(dtype, 6, 2, width, rotated, normed=normed)
    expected_query, expected_key = reference(query, key, norms, cosine, sine, width)
    cache, slots = make_cache(dtype, 2, width), torch.tensor([9, 2, 5])
    keys, values = (x[0].flatten(0, 1).unsqueeze(1) for x in (cache.keys, cache.values))
    out = torch.empty(TOKENS, 1, 6, width, dtype=dtype)
    place_heads(query, key, value, norms, cosine, sine, HeadTarget(out, keys, values, slots))
    close(out[:, 0], expected_query)
    found_key, found_value = cache.read(0, slots)
    close(found_key, expected_key)
    assert torch.equal(found_value, value.reshape(TOKENS, 2, width))


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_an_fp8_cache_is_scaled_and_saturated(scale) -> None:
    query, key, value, norms, cosine, sine = make_inputs(torch.bfloat16, 4, 2, 16, 16)
    value[0] *= 1e4
    _, expected_key = reference(query, key, norms, cosine, sine, 16)
    slots = torch.tensor([1, 0, 7])
    cache, wanted = (make_cache(torch.float8_e4m3fn, 2, 16) for _ in range(2))
    wanted.write(0, slots, expected_key / scale, value.reshape(TOKENS, 2, 16) / scale)
    keys, values = (x[0].flatten(0, 1).unsqueeze(1) for x in (cache.keys, cache.values))
    out = torch.empty(TOKENS, 1, 4, 16, dtype=torch.bfloat16)
    target = HeadTarget(out, keys, values, slots, scale, scale)
    place_heads(query, key, value, norms, cosine, sine, target)
    (found_key, found_value), (wanted_key, wanted_value) = cache.read(0, slots), wanted.read(0, slots)
    close(found_key, wanted_key)
    assert torch.equal(found_value.view(torch.uint8), wanted_value.view(torch.uint8))


@pytest.mark.parametrize("shards", [1, 4], ids=["apart", "stacked"])
@pytest.mark.parametrize(
    ("index", "query_index"),
    [(None, None), ([0, 0, 1, 1], None), ([0, 0, 1, 1], [0, 1, 2, 0, 3, 4, 5, 6])],
    ids=["even", "shared", "padded"],
)
def test_heads_are_packed_for_an_all_to_all(shards, index, query_index) -> None:
    """To [sp, t, q | k | v], from separate projections or from one stacked by head shards."""
    width, sp = 16, 4
    kv_heads = 4 if index is None else 2
    if shards > kv_heads:
        pytest.skip("stacked weights share no rows")
    query_heads = 8 if query_index is None else 7
    query, key, value, norms, cosine, sine = make_inputs(torch.bfloat16, query_heads, kv_heads, width, 16, shards)
    expected_query, expected_key = reference(query, key, norms, cosine, sine, width)
    expected_value = value.reshape(TOKENS, kv_heads, width)
    order, places = (None if given is None else torch.tensor(given) for given in (index, query_index))
    if places is not None:
        expected_query = expected_query[:, places]
    if order is not None:
        expected_key, expected_value = expected_key[:, order], expected_value[:, order]
    packed = torch.empty(sp, TOKENS, 4 * width, dtype=torch.bfloat16)
    parts = packed.transpose(0, 1).split([2 * width, width, width], dim=-1)
    target = HeadTarget(*(part.unflatten(-1, (-1, width)) for part in parts))
    place_heads(query, key, value, norms, cosine, sine, target, places, order)
    for part, expected in zip(parts, (expected_query, expected_key, expected_value), strict=True):
        close(part, expected.reshape(TOKENS, sp, -1))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_keys_and_values_are_stored(cache_dtype, heads) -> None:
    torch.manual_seed(5)
    packed = torch.randn(TOKENS, heads * (24 + 8) + 5).bfloat16() * 300
    key, value = (x.unflatten(-1, (heads, -1)) for x in packed[:, 5:].split([heads * 24, heads * 8], dim=-1))
    slots = torch.tensor([11, 3, 4])
    caches = [PagedCache(CacheShape.uniform(1, heads, 24, 8, 4, cache_dtype), 3, torch.device("cpu")) for _ in range(2)]
    caches[0].write(0, slots, key, value)
    cache_kernels.store(*(x[0].flatten(0, 1) for x in (caches[1].keys, caches[1].values)), slots, key, value)
    for expected, found in zip(caches[0].read(0, slots), caches[1].read(0, slots), strict=True):
        assert torch.equal(expected.view(torch.uint8), found.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_are_rotated_and_then_normalised(dtype) -> None:
    """llama4's layers with positions: complex numbers, and a norm without weights."""
    query, key, value, *_ = make_inputs(dtype, 6, 2, 24, 24, normed=False)
    angles = torch.rand(TOKENS, 12) * 6
    turns, norm = torch.polar(torch.ones_like(angles), angles), HeadNorm(None, 1e-5)
    expected = []
    for x in (query, key):
        pairs = torch.view_as_complex(x.reshape(TOKENS, -1, 12, 2).float())
        turned = torch.view_as_real(pairs * turns[:, None]).flatten(2).to(dtype).float()
        expected.append((turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + 1e-5)).to(dtype))
    out, keys, values = (torch.empty(TOKENS, 1, heads, 24, dtype=dtype) for heads in (6, 2, 2))
    table = torch.view_as_real(turns).flatten(1)
    place_heads(query, key, value, (norm, norm), table, None, HeadTarget(out, keys, values))
    close(out[:, 0], expected[0])
    close(keys[:, 0], expected[1])
    assert torch.equal(values[:, 0], value.reshape(TOKENS, 2, 24))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_of_layers_without_rotation_are_scaled_by_their_position(dtype) -> None:
    query, key, value, *_ = make_inputs(dtype, 6, 2, 24, 24, normed=False)
    positions, temperature = torch.tensor([7, 6, 130_000]), Temperature(8, 0.1)
    out, keys, values = (torch.empty(TOKENS, 1, heads, 24, dtype=dtype) for heads in (6, 2, 2))
    given = HeadTemperature(positions, temperature.length, temperature.strength)
    place_heads(query, key, value, (None, None), None, None, HeadTarget(out, keys, values), temperature=given)
    expected = temperature.scaled(query.reshape(TOKENS, 6, 24).transpose(0, 1), positions).transpose(0, 1)
    close(out[:, 0], expected)
    assert torch.equal(out[1, 0], query[1].reshape(6, 24)), "the first seven positions"
    assert torch.equal(keys[:, 0], key.reshape(TOKENS, 2, 24))


@pytest.mark.parametrize("order", [None, [1, 0, 3, 2, 7, 6, 5, 4]])
def test_queries_are_read_from_two_places_per_shard(order) -> None:
    """Of weights of two shards that share a KV head: query of the first, key, value, query of the second."""
    query, key, value, norms, cosine, sine = make_inputs(torch.bfloat16, 8, 2, 16, 16)
    expected_query, expected_key = reference(query, key, norms, cosine, sine, 16)
    halves = query.reshape(TOKENS, 2, 2, 32)
    others = [x.reshape(TOKENS, 2, 16) for x in (key, value)]
    whole = torch.cat([halves[:, :, 0], *others, halves[:, :, 1]], dim=2)
    out, keys, values = (torch.empty(TOKENS, 1, heads, 16, dtype=torch.bfloat16) for heads in (8, 2, 2))
    index = None if order is None else torch.tensor(order)
    views = whole.unfold(-1, 32, 64), whole[..., 32:48], whole[..., 48:64]
    place_heads(*views, norms, cosine, sine, HeadTarget(out, keys, values), index)
    close(out[:, 0], expected_query if index is None else expected_query[:, index])
    close(keys[:, 0], expected_key)
    assert torch.equal(values[:, 0], value.reshape(TOKENS, 2, 16))
