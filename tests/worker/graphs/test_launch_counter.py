"""What counts as a launch."""

from __future__ import annotations

import pytest
import torch

from ulysses_infer.kernels.launch import launch
from ulysses_infer.parallel.layout import Layout, Mode, token_spans
from ulysses_infer.worker.graphs.launch_counter import LaunchCounter, counted_collectives


def kernel_of_ours() -> None:
    """Stands in for a Triton kernel; on device meta it is only counted."""


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_operators_and_kernels_count_and_views_and_factories_do_not() -> None:
    x, counter = meta(4, 8), LaunchCounter()

    def step() -> None:
        y = (x + 1).view(8, 4).t().unsqueeze(0).expand(2, 4, 8)
        torch.empty_like(x).copy_(x)
        y.split(1)[0].reshape(-1)
        meta(0, 8).add_(1)  # nothing to do
        torch.ones(3) * 2  # on the host
        launch(kernel_of_ours, (1,), x)
        launch(kernel_of_ours, (0,), x)

    found = counter.count(step)

    assert found.kernels == {"add": 1, "copy_": 1, "clone": 1, "kernel_of_ours": 1}
    assert not found.exchanges


def test_layers_are_told_apart_by_marks() -> None:
    x, counter = meta(4), LaunchCounter()

    def step() -> None:
        x.exp()
        for _ in range(5):
            counter.mark()
            x.sin()
            x.cos()
        x.neg()

    found = counter.count(step)

    assert found.kernels_per_layer == 2
    assert found.of_a_layer == {"sin": 1, "cos": 1}
    assert found.kernels.total() == 12


def test_an_exchange_counts_as_one_and_hides_what_it_launches() -> None:
    layout, counter = Layout(Mode(4, 1)), LaunchCounter()
    sequence = counted_collectives(layout.place(Mode(4, 1), 0), counter)
    tensor = counted_collectives(layout.place(Mode(1, 4), 0), counter)
    spans = token_spans(8, 4)

    def step() -> None:
        query, _ = sequence.tokens_to_heads((meta(2, 8, 16), meta(2, 4, 16)), spans)
        back = sequence.heads_to_tokens(query.flatten(1), spans)
        tensor.sum_over_tp(back + 1)
        sequence.gather_rows(back, [2, 2, 2, 2])

    found = counter.count(step)

    assert found.exchanges == {"all-to-all": 2, "all-reduce": 1, "all-gather": 1}
    assert found.kernels == {"add": 1}


def test_each_count_starts_from_zero() -> None:
    x, counter = meta(4), LaunchCounter()
    first = counter.count(lambda: x.exp())

    counter.mark()  # of a step that is not counted

    assert counter.count(lambda: x.sin()).kernels == {"sin": 1}
    assert first.marks == []
    assert first.kernels == {"exp": 1}
    assert first.kernels_per_layer == 0


class Norm:
    """An RMS norm of ours, without its kernel."""

    eps = 1e-6

    def __init__(self, width: int) -> None:
        self.weight = torch.empty(width, dtype=torch.bfloat16, device="meta")

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor, kind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        launch(kernel_of_ours, (1,), x)
        return residual, x


@pytest.mark.parametrize(
    ("rows", "symmetric", "exchange", "kernels"),
    [
        (4, True, "all-reduce + norm", {}),
        (4, False, "all-reduce", {"kernel_of_ours": 1}),
        (400, True, "all-reduce", {"kernel_of_ours": 1}),
    ],
)
def test_small_sums_take_the_norm_with_them(rows: int, symmetric: bool, exchange: str, kernels: dict[str, int]) -> None:
    counter = LaunchCounter()
    collectives = counted_collectives(Layout(Mode(4, 1)).place(Mode(1, 4), 0), counter, symmetric)
    x = torch.empty(rows, 8192, dtype=torch.bfloat16, device="meta")

    found = counter.count(lambda: collectives.sum_add_norm(x, x, Norm(8192)))

    assert found.exchanges == {exchange: 1}
    assert found.kernels == kernels
