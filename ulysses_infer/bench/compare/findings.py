"""The results of a comparison as stored on disk, from which reports are made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ulysses_infer.atomic_files import write_atomically
from ulysses_infer.errors import ConfigError

VERSION = 1
RESULTS = "results.json"


class RequestRow(NamedTuple):
    """One request; seconds since the start of its run."""

    sent: float
    ttft: float
    tpot: float | None
    e2el: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    error: str

    @property
    def ended(self) -> float:
        """Time of its last token."""
        return self.sent + self.e2el


class StepRow(NamedTuple):
    """One step of an engine; seconds since the start of the run."""

    start: float
    seconds: float
    sp: int
    tp: int
    tokens: int
    decodes: int


@dataclass
class ContenderRun:
    """One run: a contender, a case, a repeat."""

    contender: str
    case: str
    repeat: int
    metrics: dict[str, float]
    """By key of `comparison.METRICS`."""
    requests: list[RequestRow] = field(repr=False)
    steps: list[StepRow] = field(repr=False)
    gaps: list[float] = field(repr=False)
    """Seconds between tokens, of all requests."""
    seconds: float = 0.0
    foreign_cores: float = 0.0
    """Cores that other programs kept busy."""
    late_ms: float = 0.0
    """The largest delay caused by the client itself."""

    @property
    def errors(self) -> list[str]:
        """Errors of failed requests."""
        return [request.error for request in self.requests if request.error]


@dataclass(frozen=True)
class CaseInfo:
    """A case as described in the report."""

    protocol: str
    name: str
    title: str
    kind: str
    x: float | None
    num_requests: int


@dataclass
class Findings:
    """A whole comparison."""

    about: dict[str, Any]
    """Model, machine, version and options, and the command that repeats the comparison."""
    cases: list[CaseInfo] = field(default_factory=list)
    contenders: list[str] = field(default_factory=list)
    """Contenders that took part, in display order."""
    refused: dict[str, str] = field(default_factory=dict)
    """Contenders that could not take part, with the reason."""
    runs: list[ContenderRun] = field(default_factory=list)

    def of(self, contender: str, case: str) -> list[ContenderRun]:
        """The repeats of one contender in one case."""
        return [run for run in self.runs if (run.contender, run.case) == (contender, case)]

    def protocol(self, name: str) -> list[CaseInfo]:
        """The cases of a protocol."""
        done = {run.case for run in self.runs}
        return [case for case in self.cases if case.protocol == name and case.name in done]

    def typical(self, contender: str, case: str, key: str) -> ContenderRun | None:
        """The repeat with the median value of the metric, for plots of a single run."""
        runs = sorted(self.of(contender, case), key=lambda run: run.metrics.get(key, 0.0))
        return runs[len(runs) // 2] if runs else None

    def save(self, folder: Path) -> None:
        """Write `results.json`."""
        content = {"version": VERSION, **asdict(self)}
        write_atomically(folder / RESULTS, json.dumps(content) + "\n")


def load_findings(folder: Path) -> Findings:
    """Read what `Findings.save` wrote. Raises `ConfigError` if the file is missing or invalid."""
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise ValueError("it was written by another version")
        runs = [_run(**run) for run in content.pop("runs")]
        cases = [CaseInfo(**case) for case in content.pop("cases")]
        return Findings(runs=runs, cases=cases, **content)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}; measure first, without --redraw") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is not valid: {error}; measure again") from error


def _run(requests: Iterable[Sequence[Any]], steps: Iterable[Sequence[Any]], **rest: Any) -> ContenderRun:
    return ContenderRun(requests=[RequestRow(*row) for row in requests], steps=[StepRow(*row) for row in steps], **rest)
