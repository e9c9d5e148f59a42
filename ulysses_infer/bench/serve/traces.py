"""Reads traces of production traffic: arrival time, input length and output length per request.

Two published formats: Mooncake's JSON lines (Qin et al., FAST 2025) and Azure's CSV (Patel et al., ISCA 2024).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ulysses_infer.errors import ConfigError

HASH_BLOCK_TOKENS = 512  # prompt tokens per hash id in Mooncake's traces


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace."""

    at: float
    """Seconds since the first request of the trace."""
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    """One per `HASH_BLOCK_TOKENS` tokens of the prompt; equal ids mean shared content. Empty: unknown."""


def read_trace(path: Path) -> list[TraceRow]:
    """All rows, sorted by time. Raises `ConfigError` with the invalid line."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(_azure_rows(path, file) if path.suffix == ".csv" else _mooncake_rows(path, file))
    except OSError as error:
        raise ConfigError(f"trace '{path}' cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"trace '{path}' is not a text file: {error}") from error
    if not rows:
        raise ConfigError(f"trace '{path}' has no requests")
    rows.sort(key=lambda row: row.at)
    start = rows[0].at
    return [TraceRow(row.at - start, row.input_len, row.output_len, row.hash_ids) for row in rows]


def _mooncake_rows(path: Path, lines: Iterable[str]) -> Iterator[TraceRow]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _mooncake_row(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"trace '{path}', line {number}: {line.strip()[:60]!r} is not "
                    '{"timestamp": milliseconds, "input_length": …, "output_length": …}'
                ) from error


def _mooncake_row(row: Mapping[str, Any]) -> TraceRow:
    hash_ids = tuple(int(number) for number in row.get("hash_ids") or ())
    return _checked(float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), hash_ids)


def _checked(at: float, input_len: int, output_len: int, hash_ids: tuple[int, ...] = ()) -> TraceRow:
    """Raises ValueError for numbers that no request has."""
    if not math.isfinite(at) or min(input_len, output_len) < 0:
        raise ValueError("a time that is not finite, or a negative length")
    return TraceRow(at, input_len, output_len, hash_ids)


def _azure_rows(path: Path, lines: Iterable[str]) -> Iterator[TraceRow]:
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            at = _moment(row["TIMESTAMP"])
            yield _checked(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"trace '{path}', line {number}: not TIMESTAMP,ContextTokens,GeneratedTokens as in Azure's files"
            ) from error


def _moment(text: str) -> float:
    """A timestamp such as `2023-11-16 18:17:03.9799600` in seconds, with all seven decimals."""
    whole, _, fraction = text.partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
