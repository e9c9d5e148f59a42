"""Rounds over all contenders: each is measured once per round, so that other load disturbs all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare_peers.catalogue import Contender
from benchmarks.compare_peers.environments import UnavailableError
from benchmarks.compare_peers.processes import Worker
from benchmarks.compare_peers.programs import LIMITS, PROGRAMS, Setting
from benchmarks.compare_peers.protocol import Task
from benchmarks.compare_peers.work import Work
from ulysses_infer.bench.load import LoadMeter

WARM_UP = (32, 4)  # tokens in and out of the request before each measurement, which warms up caches and clocks
FOREVER = float("inf")
Say = Callable[[str], None]


@dataclass
class Repeat:
    """The measurements of one contender in one round."""

    ttft: float
    """Seconds to the first token of the single request."""
    tpot: float
    """Seconds for each of its further tokens."""
    throughput: float
    """Tokens per second, of prompts and completions, of the concurrent requests."""
    foreign_cores: float
    """Cores that other programs used meanwhile."""


@dataclass
class Measured:
    """A whole run on one checkpoint."""

    repeats: dict[str, list[Repeat]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a contender has no repeats, or no more of them."""
    limits: list[dict[str, float]] = field(default_factory=list)
    """`bandwidth` in bytes per second and `matmul` in operations per second, once per round."""


class RunningPrograms:
    """The running programs of a comparison, each started once."""

    def __init__(self, setting: Setting, logs: Path, seconds: float, measured: Measured, say: Say) -> None:
        """seconds: the most that one start or measurement may take."""
        self.setting, self._logs, self._seconds = setting, logs, seconds
        self.measured, self._say = measured, say
        self.workers: dict[str, Worker] = {}

    @contextmanager
    def started(self, programs: Iterable[str], until: float = FOREVER) -> Iterator[None]:
        """Start programs one after the other, each once; all have ended afterwards.

        None is started after `until`, by `time.monotonic`, nor if it is known to be unavailable.
        """
        with ExitStack() as cleanup:
            for name in dict.fromkeys(programs):
                if name in self.measured.unavailable:
                    continue
                if time.monotonic() > until:
                    self._is_missing(name, "not started: the time for starting was up")
                else:
                    self._start(name, cleanup)
            yield

    def measure_limits(self) -> None:
        """Measure the machine's rates once more, if the program that does so is running."""
        worker = self.workers.get(LIMITS)
        if worker is None or LIMITS in self.measured.unavailable:
            return
        try:
            with worker.resumed():
                self.measured.limits.append(worker.measure({}))
        except UnavailableError as error:
            self._is_missing(LIMITS, str(error))

    def _start(self, name: str, cleanup: ExitStack) -> None:
        self._say(f"starting {name}")
        try:
            worker = Worker(name, PROGRAMS[name](self.setting), self._logs / f"{name}.log", self._seconds)
        except UnavailableError as error:
            self._is_missing(name, str(error))
            return
        self.workers[name] = worker
        self.measured.versions[name] = worker.version
        cleanup.callback(worker.end)

    def _is_missing(self, name: str, reason: str) -> None:
        self.measured.unavailable[name] = reason
        self._say(f"{name}: not available: {reason}")


@dataclass(frozen=True)
class Rounds:
    """Rounds over all contenders: what is measured, how often, and until when."""

    contenders: Mapping[str, Contender]
    single: Work
    concurrent: Work
    vocab_size: int
    repeats: int
    until: float = FOREVER
    """By `time.monotonic`: no measurement begins afterwards, except to warm up."""

    def run(self, running: RunningPrograms, say: Say, after_round: Callable[[], None] = lambda: None) -> None:
        """Warm up every contender with the measured work, then measure A B C, B C A, ..., limits first in each round.

        Each measurement is kept at once, so that an interrupted run has what was measured.
        """
        names = list(self.contenders)
        for turn in range(-1, self.repeats):
            if turn >= 0:
                running.measure_limits()
            shift = max(turn, 0) % len(names)
            for name in names[shift:] + names[:shift]:
                if turn >= 0 and time.monotonic() > self.until:
                    say(f"time is up in round {turn + 1} of {self.repeats}")
                    self._name_missing(running.measured)
                    return
                self._visit(running, name, turn, say)
            if turn >= 0:
                after_round()

    def _visit(self, running: RunningPrograms, name: str, turn: int, say: Say) -> None:
        measured, contender = running.measured, self.contenders[name]
        found = running.workers.get(contender.program)
        if found is None or name in measured.unavailable:
            measured.unavailable.setdefault(name, measured.unavailable.get(contender.program, ""))
            return
        say(f"{'warming up' if turn < 0 else f'round {turn + 1} of {self.repeats}:'} {name}")
        try:
            repeat = _measure(found, contender, self.single, self.concurrent, self.vocab_size, turn)
        except UnavailableError as error:
            measured.unavailable[name] = str(error)
            say(f"{name}: failed: {error}")
            return
        if turn >= 0:
            measured.repeats.setdefault(name, []).append(repeat)

    def _name_missing(self, measured: Measured) -> None:
        for name in self.contenders:
            if name not in measured.repeats:
                measured.unavailable.setdefault(name, "the time was up before its first measurement")


def _measure(
    worker: Worker, contender: Contender, single: Work, concurrent: Work, vocab_size: int, turn: int
) -> Repeat:
    def measure(work: Work) -> dict[str, Any]:
        return worker.measure(work.task(vocab_size, turn) | contender.settings)

    with worker.resumed():
        measure(Work(1, *WARM_UP))
        load = LoadMeter()
        answer_single = measure(single)
        answer_concurrent = measure(concurrent)
        foreign = load.foreign_cores()
    _check(answer_single, single)
    _check(answer_concurrent, concurrent)
    return Repeat(
        ttft=answer_single["first"],
        tpot=(answer_single["seconds"] - answer_single["first"]) / (single.output_len - 1),
        throughput=concurrent.num_tokens / answer_concurrent["seconds"],
        foreign_cores=foreign,
    )


def _check(answer: dict[str, Any], work: Work) -> None:
    """Raise `UnavailableError` unless every prompt got all its tokens: less work is not more speed."""
    lengths = [len(tokens) for tokens in answer["tokens"]]
    if lengths != [work.output_len] * work.num_prompts:
        raise UnavailableError(f"it gave {lengths} tokens for {work.num_prompts} prompts, not {work.output_len} each")


def first_tokens(
    setting: Setting,
    contenders: Mapping[str, Contender],
    logs: Path,
    seconds: float,
    work: Work,
    vocab_size: int,
    say: Say,
) -> dict[str, list[int] | str]:
    """The first greedy tokens of one prompt from each contender, or why there are none; one program at a time."""
    found: dict[str, list[int] | str] = {}
    for program in dict.fromkeys(contender.program for contender in contenders.values()):
        measured = Measured()
        running = RunningPrograms(setting, logs, seconds, measured, say)
        mine = {name: contender for name, contender in contenders.items() if contender.program == program}
        with running.started([program]):
            for name, contender in mine.items():
                found[name] = _first_tokens(running, contender, work.task(vocab_size, "check"), measured)
    return found


def _first_tokens(running: RunningPrograms, contender: Contender, task: Task, measured: Measured) -> list[int] | str:
    worker = running.workers.get(contender.program)
    if worker is None:
        return measured.unavailable[contender.program]
    try:
        with worker.resumed():
            tokens: list[int] = worker.measure(task | contender.settings)["tokens"][0]
    except UnavailableError as error:
        return str(error)
    return tokens
