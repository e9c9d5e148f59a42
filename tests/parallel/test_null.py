"""Null process groups: results have the shapes that they would have with the other ranks."""

import pytest
import torch

from ulysses_infer.parallel.layout import Layout, Mode, token_spans
from ulysses_infer.parallel.null import NullProcessGroup, null_collectives

SP = 4


@pytest.mark.parametrize("index", range(SP))
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 9])
def test_exchanges_have_the_shapes_of_real_ones(index, num_tokens):
    spans, group = token_spans(num_tokens, SP), NullProcessGroup(SP, index)
    local = spans[index].size
    query, key = torch.randn(local, SP * 3, 8), torch.randn(local, SP, 6)
    assert [tuple(x.shape) for x in group.tokens_to_heads((query, key), spans)] == [
        (num_tokens, 3, 8),
        (num_tokens, 1, 6),
    ]
    assert group.heads_to_tokens(torch.randn(num_tokens, 24), spans).shape == (local, SP * 24)
    counts = [span.size for span in spans]
    assert group.gather_rows(torch.randn(local, 5), counts).shape == (num_tokens, 5)


def test_what_a_rank_receives_is_finite_and_its_own():
    rows = torch.tensor([[1.0], [2.0]])
    assert NullProcessGroup(2, 0).gather_rows(rows, [2, 1]).tolist() == [[1.0], [2.0], [1.0]]
    assert NullProcessGroup(2, 1).gather_rows(rows[:0], [1, 0]).tolist() == [[0.0]]
    partial = torch.ones(3)
    assert NullProcessGroup(2, 0).sum(partial) is partial


def test_only_the_first_rank_gets_gathered_tensors():
    shard = torch.ones(2)
    assert len(NullProcessGroup(3, 0).gather_to_first(shard)) == 3
    assert NullProcessGroup(3, 1).gather_to_first(shard) is None


@pytest.mark.parametrize("mode", Layout(Mode(8, 1)).modes)
def test_the_groups_of_a_mode_have_its_sizes(mode):
    collectives = null_collectives(Layout(Mode(8, 1)).place(mode, 5))
    sizes = [1 if group is None else len(group.ranks) for group in (collectives.sp_group, collectives.tp_group)]
    assert sizes == [mode.sp, mode.tp]
