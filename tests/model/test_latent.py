"""Multi-head latent attention over cached latents: results, when it is enabled, and its memory."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import perturb
from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.cache.paged import FP8, CacheScales, CacheShape, PagedCache
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import ConfigError, UnsupportedModelError
from ulysses_infer.model.injection.latent_cache import has_standard_expansion
from ulysses_infer.model.injection.probe import trial_context
from ulysses_infer.model.layers import latent_chunks
from ulysses_infer.model.layers.latent import LatentWidths
from ulysses_infer.model.model import ModelBuilder, ShiftModel
from ulysses_infer.model.quantization.cache_scales import apply_cache_scales
from ulysses_infer.parallel.layout import Layout, Mode, Span

CPU = torch.device("cpu")
SERVED = ("deepseek_v2", "deepseek_v3", "longcat_flash", "minicpm3", "youtu", "glm4_moe_lite", "axk1")
DEEPSEEK = LatentWidths(512, 64, 128, 128)
"""The same for V2, V2-Lite and V3."""
BLOCK = 4


@torch.inference_mode()
def build(family: str, **changes: Any) -> Any:
    """transformers' own model, tiny, with random weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    perturb(model)
    return model.eval()


def draw(model: Any, latent: bool | None, world_size: int = 1, shard: int = 0) -> ModelBuilder:
    return ModelBuilder.from_pretrained(
        model, ModelConfig(path="-"), Layout(Mode(1, world_size)), shard, CPU, latent=latent
    )


@torch.inference_mode()
def logits_of(
    model: ShiftModel,
    steps: list[list[tuple[int, int]]],
    tokens: list[torch.Tensor],
    backend: Any,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Run `steps`, each a range of tokens per sequence, and return the logits of each: [n, V]."""
    shape = model.shape
    cache = PagedCache(
        CacheShape.uniform(
            shape.num_layers,
            shape.num_key_value_heads,
            shape.key_width,
            shape.value_width,
            BLOCK,
            dtype,
            shape.values_in_keys,
        ),
        20 * len(tokens),
        CPU,
    )
    tables = torch.stack([torch.arange(20) * len(tokens) + index for index in range(len(tokens))])
    found: list[list[torch.Tensor]] = [[] for _ in tokens]
    for step in steps:
        here = [(index, *span) for index, span in enumerate(step) if span[0] < span[1]]
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in here])
        slots = torch.cat(
            [
                tables[i][torch.arange(start, stop) // BLOCK] * BLOCK + torch.arange(start, stop) % BLOCK
                for i, start, stop in here
            ]
        )
        count = len(positions)
        metadata = AttentionMetadata(
            slots,
            [stop - start for _, start, stop in here],
            [stop for _, _, stop in here],
            tables[[i for i, _, _ in here]],
        )
        context = trial_context(model.injection.layout, 0, cache, backend)
        context = replace(context, token_spans=[Span(0, count)], logits_counts=[count], attention=metadata)
        ids = torch.cat([tokens[i][start:stop] for i, start, stop in here])
        logits = model.forward(ids, positions, torch.arange(count), context)
        for (index, *_), rows in zip(here, logits.split(metadata.query_lens), strict=True):
            found[index].append(rows)
    return [torch.cat(rows) for rows in found]


@torch.inference_mode()
def logprobs_of(theirs: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = theirs(tokens[None]).logits[0]
    return logits.log_softmax(-1)


STEPS = [
    [(0, 9), (0, 1), (0, 2)],
    [(9, 26), (1, 2), (2, 20)],  # long chunks after a prefix, with a decode
    [(26, 27), (2, 9), (20, 21)],
    [(27, 28), (9, 10), (21, 22)],
]


@pytest.mark.parametrize("backend", [TorchLoopAttention, NativeAttention])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latents_equal_heads_for_mixed_prefill_chunks_and_decodes(family: str, backend: Any) -> None:
    theirs = build(family)
    tokens = [torch.randint(3, 101, (n,), generator=torch.Generator().manual_seed(n)) for n in (28, 10, 22)]
    model = draw(theirs, True).load(fuse=False)
    found = logits_of(model, STEPS, tokens, backend())
    for ids, ours in zip(tokens, found, strict=True):
        assert (ours.log_softmax(-1) - logprobs_of(theirs, ids)).abs().max() < 1e-4


def test_heads_are_expanded_in_chunks_if_their_keys_and_values_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = build("deepseek_v3")
    tokens = [torch.randint(3, 101, (28,), generator=torch.Generator().manual_seed(0))]
    model, steps = draw(theirs, True).load(fuse=False), [[(0, 28)]]
    expected = logits_of(model, steps, tokens, TorchLoopAttention())[0]
    turns = []
    pages = latent_chunks.expand_head_chunks
    monkeypatch.setattr(latent_chunks, "MAX_EXPANDED_BYTES", 28 * (2 * 20 + 8) * 4 * 3)  # three heads of eight
    monkeypatch.setattr(
        "ulysses_infer.model.layers.latent.expand_head_chunks", lambda *a: (turns.append(p) or p for p in pages(*a))
    )
    found = logits_of(model, steps, tokens, TorchLoopAttention())[0]
    assert [heads for heads, *_ in turns] == 2 * [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert (found - expected).abs().max() < 1e-5


def test_weights_are_read_at_their_new_address() -> None:
    theirs, tokens = build("deepseek_v3"), torch.arange(3, 12)
    model = draw(theirs, True).load(fuse=False)
    steps = [[(0, 8)], [(8, 9)]]
    before = logits_of(model, steps, [tokens], TorchLoopAttention())[0]
    for name, parameter in model.module.named_parameters():
        if "kv_b_proj" in name:
            parameter.data = parameter.data * 0.5
    model.rebind()
    for layer in theirs.model.layers:
        layer.self_attn.kv_b_proj.weight.data.mul_(0.5)
    found = logits_of(model, steps, [tokens], TorchLoopAttention())[0]
    assert (found - before).abs().max() > 0.1
    assert (found.log_softmax(-1) - logprobs_of(theirs, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_an_fp8_cache_rounds_latents(scale: float) -> None:
    theirs = build("deepseek_v3")
    tokens = [torch.randint(3, 101, (n,), generator=torch.Generator().manual_seed(n)) for n in (28, 10, 22)]
    blueprint = draw(theirs, True)
    for layer in blueprint.injection.attention_layers:
        layer.head_plan.cache_scales = CacheScales(scale, scale)  # type: ignore[union-attr]
    found = logits_of(blueprint.load(fuse=False), STEPS, tokens, TorchLoopAttention(), FP8)
    exact = [logprobs_of(theirs, ids) for ids in tokens]
    for layer in theirs.model.layers:
        expand = layer.self_attn.expand_kv
        layer.self_attn.expand_kv = lambda *latent, expand=expand: expand(
            *((part / scale).to(FP8).to(part.dtype) * scale for part in latent)
        )
    for ids, ours, unrounded in zip(tokens, found, exact, strict=True):
        expected = logprobs_of(theirs, ids)
        assert (unrounded - expected).abs().mean() > 0.02
        # On average: computed in another order, a number between two of FP8 may be rounded to the other one.
        assert (ours.log_softmax(-1) - expected).abs().mean() < 2e-3


def test_latents_have_one_scale_where_a_checkpoint_has_two() -> None:
    injection = draw(build("deepseek_v3"), True).injection
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("k_scale", "v_scale")]
    scales = dict(zip(names, torch.tensor([[0.5], [2.0], [0.25], [1.0]]), strict=True))
    source = SimpleNamespace(keys=lambda: list(scales), shape=lambda k: (1,), read=lambda key, _: scales[key])
    apply_cache_scales(injection, source)  # type: ignore[arg-type]
    plans = [layer.head_plan for layer in injection.attention_layers]
    assert [plan.cache_scales for plan in plans] == [CacheScales(0.5, 0.5), CacheScales(0.25, 0.25)]


@settings(deadline=None, max_examples=60)
@given(
    widths=st.tuples(*[st.integers(1, 9)] * 4).map(lambda numbers: LatentWidths(*numbers)),
    heads=st.integers(1, 4),
    rows=st.sampled_from([1, 5, 40]),
    seed=st.integers(0, 99),
)
def test_absorbed_scores_and_outputs_are_those_of_expanded_heads(
    widths: LatentWidths, heads: int, rows: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    weight, latents = random(heads, widths.key + widths.value, widths.latent), random(7, widths.cached)
    query, shares = random(rows, heads, widths.key + widths.rotary), random(rows, heads, 7)
    keys, values = widths.expand(latents, weight)
    scores = torch.einsum("thd,nhd->thn", query, keys)
    torch.testing.assert_close(torch.einsum("thd,nd->thn", widths.absorb(query, weight), latents), scores)
    outputs = torch.einsum("thn,nhd->thd", shares, values)
    summed = torch.einsum("thn,nd->thd", shares, latents[:, : widths.latent])
    torch.testing.assert_close(widths.project_values(summed, weight), outputs)


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 9000), past=st.integers(0, 200_000))
def test_latents_are_expanded_if_that_takes_fewer_multiplications(length: int, past: int) -> None:
    w, pairs = DEEPSEEK, length * past + length * (length + 1) // 2
    own = length * w.latent * (w.key + w.value)  # one expansion per new token, or as much to absorb and release
    absorbed = own + pairs * (2 * w.latent + w.rotary)
    expanded = own + past * w.latent * (w.key + w.value) + pairs * (w.key + w.rotary + w.value)
    assert w.prefers_expansion(length, past + length) == (length > 1 and expanded < absorbed)
    if 1 < length < 170 and past > 100 * length:
        assert not w.prefers_expansion(length, past + length), "no short chunk of a long text"


@pytest.mark.parametrize("family", SERVED)
def test_supported_families_use_the_standard_expansion(family: str) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kinds = [kind for name, kind in vars(module).items() if hasattr(kind, "expand_kv")]
    assert kinds
    assert all(has_standard_expansion(kind, DEEPSEEK) for kind in kinds)


def swap(layer: Any, plain: torch.Tensor, rotated: torch.Tensor) -> Any:
    """Values before keys."""
    made = (
        layer.kv_b_proj(plain)
        .unflatten(-1, (-1, layer.qk_nope_head_dim + layer.v_head_dim))
        .transpose(1, 3)[:, :, :, 0]
    )
    value, key = made.split((layer.v_head_dim, layer.qk_nope_head_dim), dim=-1)
    return torch.cat((key, rotated.expand(-1, key.shape[1], -1, -1)), dim=-1), value


@pytest.mark.parametrize(
    "expand", [swap, lambda layer, plain, rotated: layer.missing(plain), lambda layer, plain: (plain, plain)]
)
def test_models_with_another_expansion_cache_heads(
    expand: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = build("deepseek_v3")
    monkeypatch.setattr(type(theirs.model.layers[0].self_attn), "expand_kv", expand)
    with caplog.at_level("INFO", logger="ulysses_infer"):
        shape = draw(theirs, None).shape
    assert (shape.num_key_value_heads, shape.values_in_keys) == (8, False)
    assert "the cache holds heads: its expand_kv is not just a product" in caplog.text
    with pytest.raises(
        ConfigError, match=r"cache\.latent is true, but its expand_kv is not just a product.*\(deepseek_v3\)"
    ):
        draw(theirs, True)


def test_keys_changed_after_they_were_expanded_are_refused() -> None:
    model = draw(build("deepseek_v3"), True)
    layer = model.injection.attention_layers[1]
    join = layer.expand_kv
    layer.expand_kv = lambda *latent: tuple(part * 2 for part in join(*latent))  # type: ignore[operator]
    with pytest.raises(
        UnsupportedModelError, match=r"changes keys or values after expand_kv; set cache\.latent to false"
    ):
        model.load()


def test_latents_of_a_model_without_them_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache\.latent is true, but its attention has no latents \(llama\)"):
        draw(build("llama"), True)
    assert not draw(build("llama"), None).shape.values_in_keys


def test_null_chooses_the_smaller_cache_per_rank() -> None:
    theirs = build("deepseek_v3", qk_rope_head_dim=16)  # a latent of 32 numbers; heads of 8 + 16 + 12, eight in all
    assert [draw(theirs, None, world_size).shape.values_in_keys for world_size in (1, 2, 4, 8)] == [True] * 4
    theirs = build("deepseek_v3", kv_lora_rank=32)  # 40 numbers; heads of 8 + 8 + 12
    assert [draw(theirs, None, world_size).shape.values_in_keys for world_size in (1, 2, 4, 8)] == [True] * 3 + [False]
    assert draw(theirs, True, 8).shape.values_in_keys
    assert not draw(theirs, False, 1).shape.values_in_keys


PUBLISHED = {  # bytes per token and layer in bfloat16: of a latent, and of heads on 1, 2, 4 and 8 ranks
    "deepseek_v3": (128, 1152, [81920, 40960, 20480, 10240]),
    "deepseek_v2": (16, 1152, [10240, 5120, 2560, 1280]),  # V2-Lite
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_memory_per_rank_of_published_shapes(family: str) -> None:
    heads, latent, of_heads = PUBLISHED[family]
    changes = {"num_attention_heads": heads, "num_key_value_heads": heads, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config = tiny_config(family, **changes, qk_nope_head_dim=128, v_head_dim=128)

    def bytes_of(world_size: int, wanted: bool | None) -> int:
        layout = Layout(Mode(world_size, 1))
        shape = ModelBuilder(config, dict, ModelConfig(path="-"), layout, world_size - 1, CPU, latent=wanted).shape
        cached = CacheShape.uniform(
            shape.num_layers,
            shape.key_value_heads_of(world_size - 1, layout),
            shape.key_width,
            shape.value_width,
            16,
            torch.bfloat16,
            shape.values_in_keys,
        )
        return cached.bytes_per_block // (16 * shape.num_layers)

    sizes = (1, 2, 4, 8)
    assert [bytes_of(world_size, True) for world_size in sizes] == [latent] * 4
    assert [bytes_of(world_size, False) for world_size in sizes] == of_heads
    assert [bytes_of(world_size, None) for world_size in sizes] == [latent] * 4


def test_a_latent_cache_has_no_value_tensor() -> None:
    shape = CacheShape.uniform(1, 1, 6, 4, BLOCK, torch.float32, values_in_keys=True)
    cache = PagedCache(shape, 3, CPU)
    key = torch.randn(2, 1, 6)
    cache.write(0, torch.tensor([9, 2]), key, key[..., :4])
    assert cache.values[0].data_ptr() == cache.keys[0].data_ptr()
    found = cache.read(0, torch.tensor([9, 2]))
    assert torch.equal(found[0], key)
    assert torch.equal(found[1], key[..., :4])
    assert shape.bytes_per_block == BLOCK * 6 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[1, 1], [5, 1, 3]])
def test_the_native_kernel_reads_values_from_keys(dtype: torch.dtype, lengths: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(30, BLOCK, 1, 70, generator=draw).to(dtype)
    query = torch.randn(sum(lengths), 10, 70, generator=draw).to(dtype)
    tables = torch.randperm(30, generator=draw).view(-1, 10)[: len(lengths)]
    metadata = AttentionMetadata(torch.zeros(0), lengths, [37, 20, 9][: len(lengths)], tables)
    options = AttentionOptions(scaling=0.1)
    found = NativeAttention().attend(query, keys, keys[..., :33], metadata, options)
    expected = TorchLoopAttention().attend(query.double(), keys.double(), keys[..., :33].double(), metadata, options)
    assert (found.double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
