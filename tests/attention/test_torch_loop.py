"""Attention over paged blocks compared with a reference that computes one query and one head at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention import reference
from tests.attention.reference import BATCHES, OPTIONS, make_options
from ulysses_infer.attention import torch_loop
from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.attention.selection import make_backend
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.errors import ConfigError


def check(*arguments, **named):
    reference.check(TorchLoopAttention(), *arguments, **named)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_paged_attention_equals_the_reference(batch, options, heads):
    check(*BATCHES[batch], heads, make_options(options, heads[0]))


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=4),
    name=st.sampled_from(sorted(OPTIONS)),
    block_size=st.sampled_from([1, 3, 4, 16]),
    widths=st.sampled_from([(8, 8), (12, 8), (8, 16)]),
    seed=st.integers(0, 1000),
)
def test_any_batch_over_any_blocks(sequences, name, block_size, widths, seed):
    lengths = [length for length, _ in sequences]
    contexts = [length + before for length, before in sequences]
    check(lengths, contexts, (4, 2), make_options(name, 4), *widths, block_size, seed)


@pytest.mark.parametrize("options", ["plain", "window", "soft cap", "sinks"])
def test_values_may_have_another_width_than_keys(options):
    check([1, 5], [12, 9], (4, 2), make_options(options, 4), width=12, value_width=8)


@pytest.mark.parametrize("options", ["plain", "window", "sinks"])
def test_bfloat16_stays_bfloat16(options):
    check([1, 7], [20, 11], (4, 2), make_options(options, 4), dtype=torch.bfloat16)


@pytest.mark.parametrize("options", ["plain", "window", "all"])
def test_long_prompts_are_attended_in_pieces(monkeypatch, options):
    """The piece is smaller than a sequence, so several are put together."""
    monkeypatch.setattr(torch_loop, "SCORES_PER_CALL", 100)
    monkeypatch.setattr(torch_loop, "MASK_PER_CALL", 100)
    check([30, 1], [40, 9], (4, 2), make_options(options, 4))


@given(position=st.integers(0, 60), window=st.none() | st.integers(1, 20), chunk=st.none() | st.integers(1, 20))
def test_the_first_visible_key_is_the_first_the_mask_shows(position, window, chunk):
    options = AttentionOptions(1.0, sliding_window=window, chunk_size=chunk)
    mask = options.visible(torch.tensor([position]), torch.arange(80))[0]
    assert mask.nonzero()[0].item() == options.span.first_visible(position)
    assert mask.nonzero()[-1].item() == position


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ConfigError, match="'magic'; choose one of auto, torch, native"):
        make_backend("magic", torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=str)
def test_a_chunk_after_a_long_past_is_merged_with_it(heads, dtype):
    """Past and chunk are two calls; the next sequences reuse the buffer of the first one's keys."""
    check([7, 2, 5], [90, 31, 10], heads, AttentionOptions(scaling=0.3), width=16, value_width=16, dtype=dtype)
