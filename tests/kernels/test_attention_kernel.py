"""The Triton attention kernel in the interpreter: against attention written out in float64, and the torch loop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.attention.reference import BATCHES, OPTIONS, expected, make_options, random_step, spoil_unseen
from tests.kernels.interpreter import use_exact_rounding
from tests.selection import part
from ulysses_infer.attention.backend import running_sums
from ulysses_infer.attention.torch_loop import TorchLoopAttention

pytest.importorskip("triton")

from ulysses_infer.kernels import attention as kernels
from ulysses_infer.kernels.attention import Sequences, Softmax, Tiles, attention
from ulysses_infer.kernels.launch import assume

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SMALL = Tiles(16, 16, 4, 2)
"""Small tiles, so that short sequences have several."""


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    use_exact_rounding()
    monkeypatch.setattr(kernels, "tiles_of", lambda *shape: SMALL)


def sequences_of(metadata):
    """The sequences on the device, as a step has them."""
    lengths, contexts = (np.array(x, np.int32) for x in (metadata.query_lens, metadata.context_lens))
    tensors = running_sums(lengths), contexts, metadata.block_tables.numpy().astype(np.int32)
    return Sequences(*map(torch.from_numpy, tensors), int(lengths.max()), int(contexts.max()))


def softmax_of(options, **changes):
    fields = options.scaling, options.sliding_window, options.chunk_size, options.softcap, options.sinks, options.alibi
    return Softmax(*fields, **{"relative": options.relative, **changes})


def check(
    lengths,
    contexts,
    heads,
    options,
    width=16,
    value_width=None,
    block_size=4,
    dtype=torch.float32,
    splits=None,
):
    """The kernel's output is that of attention written out."""
    value_width = value_width or width
    step = random_step(lengths, contexts, heads, width, value_width, block_size, 0, dtype)
    query, keys, values, metadata, sequences = step
    spoil_unseen(keys, values, metadata, options)
    output = attention(query, keys, values, sequences_of(metadata), softmax_of(options), splits)
    assert output.shape == (sum(lengths), heads[0], value_width)
    assert output.dtype == dtype
    wanted = expected(sequences, options)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
def test_prefill_chunks_and_decodes_in_one_launch(options):
    check(*BATCHES["mixed"], (6, 2), make_options(options, 6))


@pytest.mark.parametrize("options", OPTIONS)
def test_decodes_are_split_and_reduced(options):
    check((1, 1, 1), (3, 60, 25), (6, 2), make_options(options, 6), splits=3)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (5, 1), (20, 1)], ids=str)
@pytest.mark.parametrize("batch", ["decodes", "later chunk"])
def test_any_number_of_heads_per_kv_head(heads, batch):
    check(*BATCHES[batch], heads, make_options("sinks", heads[0]))


@pytest.mark.parametrize(("width", "value_width"), [(24, 24), (40, 40), (64, 64), (80, 80), (48, 32), (256, 256)])
def test_head_widths(width, value_width):
    check((1, 5), (20, 9), (4, 2), make_options("plain", 4), width, value_width)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_block_sizes(block_size):
    check((1, 6), (35, 20), (4, 2), make_options("window", 4), block_size=block_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    check((1, 6), (35, 20), (4, 2), make_options("all", 4), dtype=dtype, splits=2)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["bits", "native"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_caches_with_scales(dtype, capability):
    """As the torch loop reads them, with the scale of the keys in the scores and that of the values in the output."""
    step = random_step((1, 6, 3), (35, 20, 3), (4, 2), 16, 16, 4, 0, torch.float32)
    query, keys, values, metadata, _ = step
    keys, values = (keys * 0.02).to(dtype), (values * 40).to(dtype)  # with subnormal numbers and large ones
    options = make_options("all", 4, 20.0)
    wanted = TorchLoopAttention().attend(query, keys, values, metadata, options) * 0.25
    with assume("cpu", capability):
        output = attention(query, keys, values, sequences_of(metadata), softmax_of(options, value_scale=0.25), 2)
    torch.testing.assert_close(output, wanted, atol=2e-4, rtol=1e-4)


def test_every_e4m3_number_is_read_by_its_bits():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.where(numbers.isnan(), 0.0, numbers).to(torch.float8_e4m3fn).view(1, 1, 1, 256)
    starts, ones = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    sequences = Sequences(starts, ones, torch.zeros(1, 1, dtype=torch.int32), 1, 1)
    for capability in ((8, 0), (9, 0)):
        with assume("cpu", capability):
            output = attention(torch.ones(1, 1, 256), values, values.clone(), sequences, Softmax(1.0))
        assert torch.equal(output.flatten(), values.float().flatten())


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.thorough), 3])
@pytest.mark.parametrize("batch", ["decodes", "mixed"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.thorough), torch.bfloat16], ids=str)
def test_latents_are_keys_and_their_first_columns_values(dtype, batch, splits):
    lengths, contexts = BATCHES[batch]
    query, keys, _, metadata, sequences = random_step(lengths, contexts, (20, 1), 40, 32, 4, 0, dtype)
    options = make_options("plain", 20)
    output = attention(query, keys, keys[..., :32], sequences_of(metadata), softmax_of(options), splits)
    wanted = expected([(own, key, key[..., :32]) for own, key, _ in sequences], options)
    torch.testing.assert_close(output.double(), wanted, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("splits", [1, 2])
def test_sequences_without_tokens_do_nothing(splits):
    """Neither where they pad a step nor between others."""
    query, keys, values, metadata, sequences = random_step((1, 1), (9, 17), (4, 2), 16, 16, 4, 0, torch.float32)
    options = make_options("window", 4)
    wanted = expected(sequences, options)
    lengths, contexts = np.array([0, 1, 0, 1, 0, 0], np.int32), np.array([0, 9, 5, 17, 0, 0], np.int32)
    tables = torch.zeros(6, 9, dtype=torch.int32)
    tables[[1, 3], : metadata.block_tables.shape[1]] = metadata.block_tables.int()
    for most in (1, 4):
        given = Sequences(*map(torch.from_numpy, (running_sums(lengths), contexts)), tables, most, 36)
        output = attention(query, keys, values, given, softmax_of(options), splits)
        torch.testing.assert_close(output.double(), wanted, atol=2e-5, rtol=2e-5)


def test_strided_tensors():
    """Queries and caches are often parts of larger tensors."""
    step = random_step((1, 4), (9, 17), (4, 2), 16, 16, 4, 0, torch.float32)
    query, keys, values, metadata, _ = step
    options = make_options("plain", 4)
    wanted = attention(query, keys, values, sequences_of(metadata), softmax_of(options))
    query = torch.stack((query, query * 0), dim=1)[:, 0]
    both = torch.cat((keys, values), dim=-1)
    sequences = sequences_of(metadata)
    wide = torch.cat((sequences.block_tables, torch.full((2, 3), 1 << 20, dtype=torch.int32)), dim=1)
    sequences = dataclasses.replace(sequences, block_tables=wide)
    output = attention(query, both[..., :16], both[..., 16:], sequences, softmax_of(options))
    assert torch.equal(output, wanted)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "batch", "heads", "dtype", "splits"),
    part(6, OPTIONS, BATCHES, [(4, 4), (6, 2), (20, 1)], [torch.float32, torch.bfloat16], [1, 3]),
)
def test_everything_together(name, batch, heads, dtype, splits):
    check(*BATCHES[batch], heads, make_options(name, heads[0]), dtype=dtype, splits=splits)
