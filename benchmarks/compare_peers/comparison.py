"""The comparison on one checkpoint: all is prepared, sizes are chosen, programs started, rounds measured."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.compare_peers.catalogue import CONTENDERS, YARDSTICKS
from benchmarks.compare_peers.environments import UnavailableError
from benchmarks.compare_peers.floors import Sizes, floors
from benchmarks.compare_peers.measuring import Measured, Rounds, RunningPrograms, first_tokens
from benchmarks.compare_peers.models import find_model
from benchmarks.compare_peers.preparing import prepare_programs
from benchmarks.compare_peers.programs import LIMITS, Setting
from benchmarks.compare_peers.report import Limits, machine, reached, same_tokens
from benchmarks.compare_peers.work import CHOICES, Pair, Work, choose_work

CHECK = Work(num_prompts=1, input_len=64, output_len=8)
STARTING = 0.6  # of the time; programs that would start later are left out
MEASURING = 0.4  # of the time; sizes are chosen so that all rounds take this, by estimate


class Comparison:
    """One checkpoint in all contenders; `measured` and `limits` hold what there is, however the run ends."""

    def __init__(self, name: str, options: argparse.Namespace, console: Console) -> None:
        self.name, self.measured = name, Measured()
        self.work: Pair = (options.single or CHOICES[0][0], options.concurrent or CHOICES[0][1])
        self._options, self._console = options, console
        self._model: Path | None = None
        self._config: Mapping[str, Any] = {}
        self._contenders = {peer: CONTENDERS[peer] for peer in CONTENDERS if peer in options.peers}

    @property
    def title(self) -> str:
        """One line over the table."""
        single, concurrent = self.work
        rounds = max(map(len, self.measured.repeats.values()), default=0)
        options = self._options
        return (
            f"{self.name}, {options.threads} threads, instructions: {options.level}, TTFT and TPOT {single}, "
            f"tokens/s {concurrent}, medians of {rounds} rounds (ranges)"
        )

    @property
    def limits(self) -> Limits:
        """The machine's, by bits; empty before they are measured."""
        if not self.measured.limits:
            return {}
        rates = machine(self.measured)
        found = {bits: floors(Sizes.of(self._config), *self.work, *rates, bits) for bits in YARDSTICKS}
        return reached(self.measured, found)

    @property
    def is_prepared(self) -> bool:
        """Whether there is something to measure."""
        return self._model is not None

    def prepare(self) -> None:
        """All that takes long only once, and the check, if wanted.

        Problems with single contenders, or the checkpoint, are noted in `measured.unavailable`.
        """
        try:
            model = find_model(self.name, self._options.environments.resolve())
        except UnavailableError as error:
            self.measured.unavailable[self.name] = str(error)
            return
        self._config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        setting, logs = self._setting(model), self._logs()
        prepare_programs([LIMITS, *self._programs], setting, logs, self._options.timeout, self.measured, self._say)
        self._model = model
        if self._options.check:
            self._check(setting)

    def run(self, seconds: float, after_round: Callable[[], None]) -> None:
        """Measure what was prepared, for so long. Problems are noted in `measured.unavailable`."""
        began, options = time.monotonic(), self._options
        if self._model is None:
            return
        if not seconds:
            self.measured.unavailable[self.name] = "the time was up before it began"
            return
        running = RunningPrograms(self._setting(self._model), self._logs(), options.timeout, self.measured, self._say)
        with running.started([LIMITS]):
            running.measure_limits()
            self.work = self._choose_work(len(self._contenders), seconds)
            running.setting = self._setting(self._model)
            with running.started(self._programs, began + STARTING * seconds):
                rounds = Rounds(self._contenders, *self.work, self._vocab_size, options.repeats, began + seconds)
                rounds.run(running, self._say, after_round)

    @property
    def _programs(self) -> list[str]:
        return [contender.program for contender in self._contenders.values()]

    @property
    def _vocab_size(self) -> int:
        size: int = self._config["vocab_size"]
        return size

    def _setting(self, model: Path) -> Setting:
        options = self._options
        return Setting(
            model,
            "bfloat16",
            options.threads,
            max(work.input_len + work.output_len for work in (*self.work, CHECK)),
            max(work.num_prompts for work in self.work),
            options.environments.resolve(),
            dict(override.split("=", 1) for override in options.overrides),
            options.level,
        )

    def _choose_work(self, num_contenders: int, seconds: float) -> Pair:
        """What the command line says, else the largest sizes that fit."""
        options = self._options
        if not self.measured.limits:
            return self.work
        rates, sizes = machine(self.measured), Sizes.of(self._config)

        def at_least(pair: Pair) -> float:
            single, concurrent = pair
            limits = floors(sizes, single, concurrent, *rates)
            return limits.ttft + single.output_len * limits.tpot + concurrent.num_tokens / limits.throughput

        chosen = choose_work(num_contenders * (options.repeats + 1), MEASURING * seconds, at_least)
        return options.single or chosen[0], options.concurrent or chosen[1]

    def _check(self, setting: Setting) -> None:
        """Print the first tokens of all contenders in float32."""
        contenders = {peer: contender for peer, contender in self._contenders.items() if contender.bits == 16}
        exact = replace(setting, dtype="float32")
        found = first_tokens(exact, contenders, self._logs(), self._options.timeout, CHECK, self._vocab_size, self._say)
        self._console.print(same_tokens(found))

    def _logs(self) -> Path:
        folder: Path = self._options.output / "logs" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _say(self, text: str) -> None:
        self._console.print(f"{self.name}: {text}", style="dim", highlight=False, markup=False, soft_wrap=True)
