"""Requests of a simulation: from a trace, or drawn at a rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ulysses_infer.bench.serve.arrivals import Rate, arrival_times
from ulysses_infer.bench.serve.traces import TraceRow
from ulysses_infer.errors import ConfigError

MOST_REQUESTS = 2_000_000
MOST_SECONDS = 1e9  # virtual; later, a step would be shorter than the precision of the clock
MOST_WORK = 100_000_000
"""Output tokens and pieces of prompts, over all simulations: hours if no two requests share a step."""


@dataclass(frozen=True)
class Traffic:
    """Requests of equal lengths."""

    input_len: int
    output_len: int
    rate: float
    """Requests per second; infinite: all at once."""
    num_requests: int
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps: 1 is a Poisson process, less is burstier."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for numbers that no traffic has."""
        for name in ("input_len", "output_len", "rate", "num_requests", "burstiness"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"traffic with {name} = {getattr(self, name)}: give a number above 0")
        if self.num_requests > MOST_REQUESTS:
            raise ConfigError(
                f"{self.num_requests:,} requests are too many to simulate; give at most {MOST_REQUESTS:,}"
            )

    def rows(self) -> list[TraceRow]:
        """The requests, by arrival."""
        times = arrival_times(self.num_requests, Rate(self.rate), self.burstiness, self.seed)
        return [TraceRow(at, self.input_len, self.output_len) for at in times]


def simulated_block_size(rows: Sequence[TraceRow]) -> int:
    """Tokens per block of a simulation: about 1/64 of a request, 16 to 128. Larger blocks simulate faster."""
    mean = sum(row.input_len + row.output_len for row in rows) / max(1, len(rows))
    return int(min(128, max(16, 1 << int(mean / 64).bit_length() >> 1)))


def prompt_hashes(row: TraceRow, index: int, block_size: int, tokens_per_hash: float) -> list[bytes]:
    """Block hashes of a prompt's full blocks. Rows share those whose hash ids they share; others are unique.

    A trace's ids identify whole prefixes, as our chained hashes do.
    """
    count = row.input_len // block_size
    if not row.hash_ids:
        return [b"%d/%d" % (index, number) for number in range(count)]
    last = len(row.hash_ids) - 1
    return [
        b"id %d/%d" % (row.hash_ids[min(int((number * block_size) // tokens_per_hash), last)], number)
        for number in range(count)
    ]


def check_lengths(rows: Sequence[TraceRow], max_model_len: int) -> list[TraceRow]:
    """The rows that the model can serve. Raises `ConfigError` if it can serve none."""
    fitting = [row for row in rows if row.input_len > 0 and row.input_len + row.output_len <= max_model_len]
    if not fitting:
        shortest = min((row.input_len + row.output_len for row in rows), default=0)
        raise ConfigError(
            f"no request fits: the shortest has {shortest} tokens, the model serves {max_model_len}; "
            "raise --max-model-len or give another trace"
        )
    return fitting


def check_size(rows: Sequence[TraceRow], num_candidates: int, piece: int) -> None:
    """Raise `ConfigError` for requests whose simulation would take hours to days, or last longer than a clock can tell.

    piece: prompt tokens of a block or, if fewer, of a step.
    """
    if not rows[-1].at <= MOST_SECONDS:
        raise ConfigError(
            f"the last of {len(rows):,} requests arrives after {rows[-1].at:.3g} s, but at most {MOST_SECONDS:.0e} s "
            "are simulated; give a higher --rate, or a smaller --time-scale"
        )
    work = num_candidates * sum(row.output_len + row.input_len // piece for row in rows)
    if work <= MOST_WORK:
        return
    fewer = len(rows) * MOST_WORK // work
    remedy = f"--num-prompts {fewer}, or a part of the trace" if fewer else "shorter ones"
    raise ConfigError(
        f"{len(rows):,} requests with {sum(row.output_len for row in rows):,} output tokens, simulated for "
        f"{num_candidates} layouts and policies, would take hours to days; give {remedy}"
    )


def describe(rows: Sequence[TraceRow]) -> str:
    """One line about the workload."""
    inputs, outputs = (sum(getattr(row, name) for row in rows) / len(rows) for name in ("input_len", "output_len"))
    seconds = rows[-1].at
    rate = f"{len(rows) / seconds:.2f} requests/s over {seconds:.0f} s" if seconds > 0 else "all at once"
    return f"{len(rows):,} requests, {rate}; on average {math.ceil(inputs):,} tokens in, {math.ceil(outputs):,} out"
