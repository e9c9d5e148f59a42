"""Rounds over all contenders: each is measured once per round, so that other load disturbs all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare_peers.catalogue import LIMITS, PROGRAMS, Contender, Setting
from benchmarks.compare_peers.environments import UnavailableError
from benchmarks.compare_peers.processes import Worker
from benchmarks.compare_peers.protocol import Task
from ulysses_infer.bench.load import LoadMeter

WARM_UP = (32, 4)  # tokens in and out of the request before each measurement, which warms up caches and clocks
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """One kind of measurement: concurrent requests of one shape."""

    num_prompts: int
    input_len: int
    output_len: int

    @property
    def num_tokens(self) -> int:
        """Of all prompts and completions."""
        return self.num_prompts * (self.input_len + self.output_len)

    def task(self, vocab_size: int, seed: object) -> Task:
        """Random prompts, equal for an equal seed."""
        draw = random.Random(f"{seed}")
        prompts = [[draw.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]
        return {"prompts": prompts, "output_len": self.output_len}


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
        self._setting, self._logs, self._seconds = setting, logs, seconds
        self._measured, self._say = measured, say
        self.workers: dict[str, Worker] = {}

    @contextmanager
    def started(self, programs: Iterable[str]) -> Iterator[None]:
        """Start programs one after the other, each once; all have ended afterwards."""
        with ExitStack() as cleanup:
            for name in dict.fromkeys(programs):
                self._start(name, cleanup)
            yield

    def _start(self, name: str, cleanup: ExitStack) -> None:
        self._say(f"starting {name}")
        try:
            worker = Worker(name, PROGRAMS[name](self._setting), self._logs / f"{name}.log", self._seconds)
        except UnavailableError as error:
            self._measured.unavailable[name] = str(error)
            self._say(f"{name}: not available: {error}")
            return
        self.workers[name] = worker
        self._measured.versions[name] = worker.version
        cleanup.callback(worker.end)


def run_rounds(
    running: RunningPrograms,
    contenders: Mapping[str, Contender],
    measured: Measured,
    single: Work,
    concurrent: Work,
    vocab_size: int,
    repeats: int,
    say: Say,
    until: float = float("inf"),
) -> None:
    """Warm up every contender with the measured work, then measure A B C, B C A, ..., limits at each round's start.

    No round but the first begins after `until`, by `time.monotonic`.
    """
    names = list(contenders)
    for turn in range(-1, repeats):
        if turn > 0 and time.monotonic() > until:
            say(f"time is up after {turn} of {repeats} rounds")
            return
        if turn >= 0 and LIMITS in running.workers:
            worker = running.workers[LIMITS]
            with worker.resumed():
                measured.limits.append(worker.measure({}))
        shift = max(turn, 0) % len(names)
        for name in names[shift:] + names[:shift]:
            contender = contenders[name]
            found = running.workers.get(contender.program)
            if found is None or name in measured.unavailable:
                measured.unavailable.setdefault(name, measured.unavailable.get(contender.program, ""))
                continue
            say(f"{'warming up' if turn < 0 else f'round {turn + 1} of {repeats}:'} {name}")
            try:
                repeat = _measure(found, contender, single, concurrent, vocab_size, turn)
            except UnavailableError as error:
                measured.unavailable[name] = str(error)
                say(f"{name}: failed: {error}")
                continue
            if turn >= 0:
                measured.repeats.setdefault(name, []).append(repeat)


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
