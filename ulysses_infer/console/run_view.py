"""The state of a running `generate`, for the displays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ulysses_infer.engine.stats import StepRecord
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.sampling_params import SamplingParams


@dataclass
class RunView:
    """The requests of one run and the steps it has taken; fed by `on_step`."""

    titles: list[str]
    """Each prompt as the user wrote it."""
    params: list[SamplingParams]
    arrivals: list[int]
    """The step at which each prompt arrives."""
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    """The latest output of each request that has a token."""
    steps: list[StepRecord] = field(default_factory=list)
    first_steps: dict[int, int] = field(default_factory=dict)
    """The step in which each request got its first token."""
    started: float = field(default_factory=time.monotonic)

    def take(self, touched: dict[int, RequestOutput], recent: Sequence[StepRecord]) -> None:
        """Record one step."""
        self.outputs.update(touched)
        for index in touched:
            self.first_steps.setdefault(index, len(self.steps))
        self.steps.append(recent[-1])

    @property
    def seconds(self) -> float:
        """Seconds since the first prompt."""
        return time.monotonic() - self.started

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(len(sequence.token_ids) for output in self.outputs.values() for sequence in output.outputs)

    @property
    def most_tokens(self) -> int | None:
        """The most tokens there can be in the end; None: no limit."""
        total = 0
        for index, params in enumerate(self.params):
            output = self.outputs.get(index)
            if output is not None and output.finished:
                total += sum(len(sequence.token_ids) for sequence in output.outputs)
            elif params.max_tokens is None:
                return None
            else:
                total += params.n * params.max_tokens
        return total

    def count(self, *, finished: bool) -> int:
        """Requests that have finished, or that run."""
        return sum(output.finished == finished for output in self.outputs.values())
