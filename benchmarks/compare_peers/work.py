"""What is measured: a single request and concurrent ones, of sizes that suit the machine and the time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.compare_peers.protocol import Task

SLOWEST = 4.0  # a contender's time over the machine's limit, on average


@dataclass(frozen=True)
class Work:
    """One kind of measurement: concurrent requests of one shape."""

    num_prompts: int
    input_len: int
    output_len: int

    def __str__(self) -> str:
        return f"{self.num_prompts}x{self.input_len}/{self.output_len}"

    @property
    def num_tokens(self) -> int:
        """Of all prompts and completions."""
        return self.num_prompts * (self.input_len + self.output_len)

    def task(self, vocab_size: int, seed: object) -> Task:
        """Random prompts, equal for an equal seed."""
        draw = random.Random(f"{seed}")
        prompts = [[draw.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]
        return {"prompts": prompts, "output_len": self.output_len}


def parse_work(text: str) -> Work:
    """`32x256/64`: 32 prompts of 256 tokens, 64 out each. Raises `ValueError`."""
    count, _, lengths = text.partition("x")
    given, _, wanted = lengths.partition("/")
    work = Work(int(count), int(given), int(wanted))
    if work.num_prompts < 1 or work.input_len < 1 or work.output_len < 2:
        raise ValueError(text)
    return work


Pair = tuple[Work, Work]
"""The single request and the concurrent ones."""
CHOICES: tuple[Pair, ...] = (
    (Work(1, 512, 64), Work(32, 256, 64)),
    (Work(1, 256, 32), Work(16, 128, 32)),
    (Work(1, 128, 24), Work(8, 64, 16)),
    (Work(1, 64, 8), Work(8, 32, 8)),
)
"""From the largest on."""


def choose_work(visits: int, seconds: float, at_least: Callable[[Pair], float]) -> Pair:
    """The largest choice of which `visits` measurements end within `seconds`; the smallest if none does.

    at_least: the machine's limit for a pair, in seconds.
    """
    fitting = (pair for pair in CHOICES if visits * SLOWEST * at_least(pair) <= seconds)
    return next(fitting, CHOICES[-1])
