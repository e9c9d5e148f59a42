"""The steps of a benchmark by size: which mode is the faster for which, and what switching between them can save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from ulysses_infer.engine.stats import StepRecord


class StepSize(NamedTuple):
    """Steps of similar size."""

    has_prompts: bool
    most_tokens: int
    """A power of two; steps of at most half as many tokens are of the next smaller size."""

    @classmethod
    def of(cls, step: StepRecord) -> StepSize:
        """The size of a step."""
        return cls(step.num_decodes < step.num_tokens, 1 << max(0, step.num_tokens - 1).bit_length())

    def __str__(self) -> str:
        """For the table."""
        count = str(self.most_tokens) if self.most_tokens < 3 else f"{self.most_tokens // 2 + 1}..{self.most_tokens}"
        return f"{count} tokens, {'with prompts' if self.has_prompts else 'decodes'}"


@dataclass(frozen=True)
class StepTotal:
    """Steps of one size."""

    steps: int = 0
    seconds: float = 0.0

    def __add__(self, other: StepTotal) -> StepTotal:
        return StepTotal(self.steps + other.steps, self.seconds + other.seconds)

    @property
    def mean(self) -> float:
        """Seconds per step."""
        return self.seconds / self.steps


Totals = Mapping[StepSize, StepTotal]


def totals(steps: Iterable[StepRecord]) -> dict[StepSize, StepTotal]:
    """Steps by size."""
    found: dict[StepSize, StepTotal] = {}
    for step in steps:
        size = StepSize.of(step)
        found[size] = found.get(size, StepTotal()) + StepTotal(1, step.seconds)
    return found


def summed(runs: Iterable[Totals]) -> dict[StepSize, StepTotal]:
    """Steps by size over several runs."""
    found: dict[StepSize, StepTotal] = {}
    for run in runs:
        for size, total in run.items():
            found[size] = found.get(size, StepTotal()) + total
    return found


def savings(own: Totals, other: Totals) -> float:
    """Seconds that the steps of `own` would take less if those of each size ran in the faster of the two modes.

    Steps of a size are compared in total, because the shorter of two noisy times would be too short.
    """
    common = own.keys() & other.keys()
    return sum(own[size].steps * max(0.0, own[size].mean - other[size].mean) for size in common)


def size_table(tp: Totals, sp: Totals, num_runs: int) -> Table:
    """One row per size that occurs in both modes, the largest first."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    table.add_column("steps of", no_wrap=True)
    for title in ("per run", "tp ms", "sp ms", "sp / tp"):
        table.add_column(title, justify="right", no_wrap=True)
    for size in sorted(tp.keys() & sp.keys(), reverse=True):
        times = tp[size].mean, sp[size].mean
        count = round(tp[size].steps / num_runs)
        table.add_row(
            str(size), str(count), *(f"{seconds * 1e3:.2f}" for seconds in times), f"{times[1] / times[0]:.2f}x"
        )
    return table


def sizes_as_json(by_mode: Mapping[str, Sequence[Totals]]) -> dict[str, list[dict[str, Any]]]:
    """By mode: steps and seconds of each size, over all runs."""
    return {
        mode: [{**size._asdict(), "steps": total.steps, "seconds": total.seconds} for size, total in sorted(sums)]
        for mode, sums in ((mode, summed(runs).items()) for mode, runs in by_mode.items())
    }
