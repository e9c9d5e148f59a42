"""Rounds over all contenders: each is measured once a round, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare_peers.asking import Task
from benchmarks.compare_peers.catalogue import LIMITS, PROGRAMS, Contender, Setting
from benchmarks.compare_peers.environments import UnavailableError
from benchmarks.compare_peers.processes import Worker
from ulysses_infer.bench.load import LoadMeter

WAKE_UP = (32, 4)  # tokens in and out of the request before each measurement: caches and clocks get warm
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """One kind of measurement: requests of a shape that come together."""

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
    """What one round measured of one contender."""

    ttft: float
    """Seconds to the first token of the lone request."""
    tpot: float
    """Seconds for each of its further tokens."""
    throughput: float
    """Tokens a second, of prompts and completions, of the requests that came together."""
    foreign_cores: float
    """What other programs took meanwhile, in cores."""


@dataclass
class Measured:
    """A whole run on one checkpoint."""

    repeats: dict[str, list[Repeat]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a contender has no repeats, or no more of them."""
    limits: list[dict[str, float]] = field(default_factory=list)
    """`bandwidth` in bytes a second and `matmul` in operations a second, once a round."""


class Field:
    """All programs of a comparison, each started once and kept."""

    def __init__(self, setting: Setting, logs: Path, seconds: float, measured: Measured, say: Say) -> None:
        self._setting, self._logs, self._seconds = setting, logs, seconds
        self._measured, self._say = measured, say
        self.workers: dict[str, Worker] = {}

    @contextmanager
    def started(self, programs: Iterable[str]) -> Iterator[None]:
        """Start programs, each once and one after the other; everything has ended afterwards."""
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
    field: Field,
    contenders: Mapping[str, Contender],
    measured: Measured,
    lone: Work,
    together: Work,
    vocab_size: int,
    repeats: int,
    say: Say,
) -> None:
    """Warm every contender up with the very work, then measure A B C, B C A, ..., limits at each round's start."""
    names = list(contenders)
    for turn in range(-1, repeats):
        if turn >= 0 and LIMITS in field.workers:
            worker = field.workers[LIMITS]
            with worker.awake():
                measured.limits.append(worker.ask({}))
        shift = max(turn, 0) % len(names)
        for name in names[shift:] + names[:shift]:
            contender = contenders[name]
            found = field.workers.get(contender.program)
            if found is None or name in measured.unavailable:
                measured.unavailable.setdefault(name, measured.unavailable.get(contender.program, ""))
                continue
            say(f"{'warming up' if turn < 0 else f'round {turn + 1} of {repeats}:'} {name}")
            try:
                repeat = _measure(found, contender, lone, together, vocab_size, turn)
            except UnavailableError as error:
                measured.unavailable[name] = str(error)
                say(f"{name}: failed: {error}")
                continue
            if turn >= 0:
                measured.repeats.setdefault(name, []).append(repeat)


def _measure(worker: Worker, contender: Contender, lone: Work, together: Work, vocab_size: int, turn: int) -> Repeat:
    def ask(work: Work) -> dict[str, Any]:
        return worker.ask(work.task(vocab_size, turn) | contender.settings)

    with worker.awake():
        ask(Work(1, *WAKE_UP))
        load = LoadMeter()
        alone = ask(lone)
        crowd = ask(together)
        foreign = load.foreign_cores()
    _check(alone, lone)
    _check(crowd, together)
    return Repeat(
        ttft=alone["first"],
        tpot=(alone["seconds"] - alone["first"]) / (lone.output_len - 1),
        throughput=together.num_tokens / crowd["seconds"],
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
        field = Field(setting, logs, seconds, measured, say)
        mine = {name: contender for name, contender in contenders.items() if contender.program == program}
        with field.started([program]):
            for name, contender in mine.items():
                found[name] = _first_tokens(field, contender, work.task(vocab_size, "check"), measured)
    return found


def _first_tokens(field: Field, contender: Contender, task: Task, measured: Measured) -> list[int] | str:
    worker = field.workers.get(contender.program)
    if worker is None:
        return measured.unavailable[contender.program]
    try:
        with worker.awake():
            tokens: list[int] = worker.ask(task | contender.settings)["tokens"][0]
    except UnavailableError as error:
        return str(error)
    return tokens
