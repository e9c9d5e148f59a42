"""Cuts a window from a trace and scales its rate and lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ulysses_infer.bench.serve.traces import HASH_BLOCK_TOKENS, TraceRow
from ulysses_infer.errors import ConfigError

MINUTE = 60.0


@dataclass(frozen=True)
class Window:
    """A time window of a trace in minutes since its first request, both ends included."""

    start: float = 0.0
    end: float = math.inf

    def cut(self, rows: Sequence[TraceRow]) -> list[TraceRow]:
        """Its rows, in seconds since its start. Raises `ConfigError` if there are none."""
        start, end = self.start * MINUTE, self.end * MINUTE
        inside = [dataclasses.replace(row, at=row.at - start) for row in rows if start <= row.at <= end]
        if not inside:
            minutes = max((row.at for row in rows), default=0.0) / MINUTE
            raise ConfigError(
                f"no requests from minute {self.start:g} to {self.end:g}; the trace has {minutes:.1f} minutes"
            )
        return inside


PAPER_WINDOWS = {".csv": Window(2, 17), ".jsonl": Window(0, 15)}
"""The paper's windows of Azure's code trace and of Mooncake's conversations, by file suffix."""


def paper_window(path: Path) -> Window:
    """The paper's window of a trace. Raises `ConfigError` for any other file."""
    if path.suffix not in PAPER_WINDOWS:
        raise ConfigError(f"--window paper is for Azure's .csv and Mooncake's .jsonl, not '{path.name}'; give minutes")
    return PAPER_WINDOWS[path.suffix]


@dataclass(frozen=True)
class Scale:
    """How the rows of a trace are scaled."""

    time: float = 1.0
    """Factor of times: 0.5 is twice as fast."""
    length: float = 1.0
    """Factor of token counts, including shared blocks; at least one token remains."""
    max_input_len: int | None = None
    max_output_len: int | None = None

    @property
    def block_tokens(self) -> float:
        """Prompt tokens per hash id after scaling."""
        return HASH_BLOCK_TOKENS * self.length

    def apply(self, rows: Sequence[TraceRow]) -> list[TraceRow]:
        """The rows, scaled. Shared prefixes stay shared, up to the length of the shorter prompt."""
        return [self._scaled(row) for row in rows]

    def _scaled(self, row: TraceRow) -> TraceRow:
        input_len = _limited(row.input_len * self.length, self.max_input_len)
        hash_ids = row.hash_ids[: math.ceil(input_len / self.block_tokens)]
        output_len = _limited(row.output_len * self.length, self.max_output_len)
        return TraceRow(row.at * self.time, input_len, output_len, hash_ids)

    def num_shortened(self, rows: Sequence[TraceRow]) -> int:
        """How many rows the limits shorten beyond the scale."""
        free = Scale(self.time, self.length)
        return sum(
            (scaled.input_len, scaled.output_len) != (whole.input_len, whole.output_len)
            for scaled, whole in zip(self.apply(rows), free.apply(rows), strict=True)
        )


def _limited(length: float, most: int | None) -> int:
    whole = max(1, round(length))
    return whole if most is None else min(whole, most)


def thinned(rows: Sequence[TraceRow], count: int) -> list[TraceRow]:
    """At most `count` of the rows, chosen evenly, so that bursts are preserved."""
    if count >= len(rows):
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)]
