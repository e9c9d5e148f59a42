"""Results of checks: compared with a target, skipped with a reason, or failed with an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ulysses_infer.errors import kind_and_line

PASSED, FAILED, SKIPPED, MEASURED = "pass", "FAIL", "skipped", "measured"
COLUMNS = ("check", "value", "target", "result")


@dataclass(frozen=True)
class Settings:
    """What is checked, and where."""

    device: torch.device
    ranks: int
    """GPUs, or processes on a CPU."""
    quick: bool
    """Small shapes and few repeats: whether everything runs, not how fast."""
    model: Path
    """Checkpoint for the checks of engines."""

    @property
    def has_targets(self) -> bool:
        """Whether speeds are compared with targets: on a GPU, unless shapes are small."""
        return self.device.type == "cuda" and not self.quick


@dataclass(frozen=True)
class Result:
    """One line of the table. number: the value, if it is one; outcome: pass, FAIL, skipped, or measured (no target)."""

    check: str
    value: str
    target: str
    outcome: str
    reason: str = ""
    number: float | None = None


class SkippedError(Exception):
    """A check cannot run here; says why."""


Group = Callable[[Settings], Iterable[Result]]


def at_most(check: str, number: float, limit: float) -> Result:
    """A value that must not exceed `limit`."""
    return Result(check, f"{number:.4g}", f"<= {limit:g}", PASSED if number <= limit else FAILED, "", number)


def at_least(check: str, number: float, limit: float, applies: bool = True) -> Result:
    """A value that must reach `limit`. applies: otherwise it is only shown."""
    value, target = f"{number:.4g}", f">= {limit:g}"
    if not applies:
        return Result(check, value, target, SKIPPED, "the target is for GPUs and full size", number)
    return Result(check, value, target, PASSED if number >= limit else FAILED, "", number)


def measured(check: str, number: float, unit: str) -> Result:
    """A value without a target."""
    return Result(check, f"{number:.4g} {unit}", "-", MEASURED, "", number)


def equal(check: str, number: int, total: int) -> Result:
    """`number` of `total` items agree, and all must."""
    return Result(check, f"{number} of {total}", "all", PASSED if number == total > 0 else FAILED, "", float(number))


def skipped(check: str, reason: str) -> Result:
    """A check that cannot run here."""
    return Result(check, "-", "-", SKIPPED, reason)


def run_group(name: str, group: Group, settings: Settings) -> Iterator[Result]:
    """The results of a group of checks; an error ends the group and fails it."""
    try:
        yield from group(settings)
    except SkippedError as error:
        yield skipped(name, str(error))
    except Exception as error:  # whatever a driver, a library or a kernel raises is the result of the check
        yield Result(name, "-", "no error", FAILED, kind_and_line(error))


def table(results: Iterable[Result]) -> str:
    """All results as an aligned table."""
    rows = [COLUMNS, *((r.check, r.value, r.target, f"{r.outcome}{': ' * bool(r.reason)}{r.reason}") for r in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def as_dicts(results: Iterable[Result]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(result) for result in results]
