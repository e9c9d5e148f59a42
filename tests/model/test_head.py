"""The sharded vocabulary head: concatenated logits and argmax equal those of the full head."""

import pytest
import torch
from torch import nn

from tests.model.fake_step import FakeCollectives, step
from ulysses_infer.model.sampling.head import (
    ShardedHead,
    concat_shards,
    global_argmax,
    global_argmax_torch,
    local_argmax,
    pad_shard,
)
from ulysses_infer.parallel.layout import Layout, Mode, Span

VOCABULARY = 13


def heads(source, world_size, tied_to=None):
    """The head of every rank, filled from `source`."""
    layout = Layout(Mode(world_size, 1))
    made = []
    for shard in range(world_size):
        head = ShardedHead(source, layout.place(layout.base, shard), tied_to)
        for name, parameter in head.named_parameters():
            dimension, (span,) = head.slices(name)
            parameter.data.copy_(getattr(source, name).detach().narrow(dimension, span.start, span.size))
        made.append(head)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 13, 16])
def test_concatenated_shards_equal_the_full_heads_logits(world_size, bias):
    source = nn.Linear(6, VOCABULARY, bias=bias)
    hidden = torch.randn(1, 5, 6)
    with step(FakeCollectives(), logits_counts=[5]):
        shards = [head(hidden)[0] for head in heads(source, world_size)]
    sent = [pad_shard(shard, VOCABULARY, world_size) for shard in shards]
    assert len({shard.shape for shard in sent}) == 1, "equal shapes share one gather"
    torch.testing.assert_close(concat_shards(sent, VOCABULARY), source(hidden)[0])


def test_concatenated_shards_contain_no_padding():
    shards = [pad_shard(torch.full((2, size), 5.0), VOCABULARY, 8) for size in (1, 2, 1, 2, 2, 1, 2, 2)]
    assert concat_shards(shards, VOCABULARY).eq(5.0).all()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])  # 16: more ranks than tokens
def test_the_global_argmax_equals_the_argmax_of_the_full_row(world_size):
    logits = torch.randn(50, VOCABULARY)
    assert best_over(logits, world_size) == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ties_go_to_the_lowest_id(world_size):
    logits = torch.zeros(4, VOCABULARY)
    logits[1, 3:] = 7.0
    logits[2, [12, 5, 9]] = 7.0
    logits[3] = float("-inf")
    assert best_over(logits, world_size) == [0, 3, 5, 0]


def best_over(logits, world_size):
    layout = Layout(Mode(world_size, 1))
    spans = [
        ShardedHead(nn.Linear(1, VOCABULARY), layout.place(layout.base, g), None).vocabulary for g in range(world_size)
    ]
    pairs = torch.stack([local_argmax(logits[:, slice(*span)], span) for span in spans])
    found = global_argmax(pairs).tolist()
    assert global_argmax(pairs.flip(0)).tolist() == found, "in any order of the ranks"
    assert global_argmax_torch(pairs).tolist() == global_argmax_torch(pairs.flip(0)).tolist() == found
    return found


@pytest.mark.parametrize("best", [global_argmax, global_argmax_torch])
def test_nan_counts_as_the_largest_value_on_any_rank(best):
    pairs = torch.tensor([[[3.0, 1], [torch.nan, 2], [1.0, 0]], [[torch.nan, 7], [9.0, 8], [2.0, 9]]]).double()
    assert best(pairs).tolist() == [7, 2, 9]


def test_large_ids_survive_the_comparison():
    span = Span(16_777_216, 16_777_218)  # float32 cannot distinguish these ids
    assert global_argmax(local_argmax(torch.tensor([[0.0, 1.0]]), span)[None]).tolist() == [16_777_217]


def test_bfloat16_logits_are_compared_as_they_are():
    pairs = local_argmax(torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16), Span(0, 2))
    assert global_argmax(pairs[None]).tolist() == [1]


def test_a_tied_head_is_a_view_of_the_embedding():
    embedding = nn.Embedding(VOCABULARY, 6)
    source = nn.Linear(6, VOCABULARY, bias=False)
    source.weight = embedding.weight
    for head in heads(source, 4, tied_to=embedding):
        assert list(head.named_parameters()) == []
        rows = head.rows()
        assert torch.equal(rows, embedding.weight[slice(*head.vocabulary)])
        assert rows.untyped_storage().data_ptr() == embedding.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 1000])
def test_the_local_argmax_equals_torchs(dtype, width):
    logits = torch.randn(9, width).mul(3).round().to(dtype)  # many ties
    logits[1], logits[2], logits[3] = -torch.inf, torch.inf, -0.0
    logits[4, width // 2 :], logits[5], logits[6, width // 3] = 0.0, -5.0, torch.nan
    expected = logits.max(dim=-1)
    values, ids = local_argmax(logits, Span(40, 40 + width)).T
    torch.testing.assert_close(values, expected.values.double(), equal_nan=True)
    lowest = [int(torch.nonzero(row.isnan() | (row == row.max()))[0]) for row in logits.double().nan_to_num(nan=1e9)]
    assert ids.tolist() == [40 + index for index in lowest]
