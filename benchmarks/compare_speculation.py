"""What speculation gains and costs, as ratios to none in the same run: `python -m benchmarks.compare_speculation`.

One engine of two ranks per model. Before each run, rank 0 gets the speculation under test, or none; weights, cache and
graphs stay. Settings alternate, so that disturbances affect all of them, and every ratio is that of one repeat.

Disturbances of the machine hit single steps, and the best of several fixed numbers of tokens is the one they spared. So
`auto` is also compared by typical step times: each step after the prompts counts as the median of all steps of the load
with as many rows, whatever the setting. What is left is what it chose. Steps that are recorded, which happens once for
each size, are no samples.

SmolLM2-135M edits code of Python's own library and writes JSON under a schema. The random weights of llama-60m can
repeat nothing, so it becomes a `counting_model`, whose output repeats its prompt as the edited code repeats the code.
Interrupted or out of time, it prints what is finished.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from benchmarks.counting_model import counting_model, edit_prompt, random_prompt
from benchmarks.json_output import JsonStudy
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.bench.load import LoadMeter
from ulysses_infer.bench.serve.repetition import REPETITIVE, code_edits
from ulysses_infer.bench.workload import Sample, sample_of
from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.config import SpeculationConfig
from ulysses_infer.console.screen import make_console
from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.engine.speculation.speculation import Speculation
from ulysses_infer.engine.speculation.start import start_speculation
from ulysses_infer.inference import InferenceEngine

FIXED = (1, 3, 7, 15)  # with the known token, steps of 2, 4, 8 and 16 rows: what kernels like best
NONE = "none"
SETTINGS = {
    NONE: SpeculationConfig(),
    "ngram": SpeculationConfig(method="ngram"),
    # All outputs of a counting model are alike: sharing them would foresee even what is meant to be unknown.
    "suffix": SpeculationConfig(method="suffix", share_outputs=False),
    **{f"ngram, {count} tokens": SpeculationConfig(method="ngram", num_tokens=count) for count in FIXED},
}
CHOSEN = (NONE, "ngram", "suffix")
COUNTS = (NONE, "ngram", *(f"ngram, {count} tokens" for count in FIXED[:-1]))
MOST_REQUESTS = 16
JSON = "JSON"
LOADS = (
    "a code edit",
    "random text",
    f"{MOST_REQUESTS} random texts",
    "4 code edits",
    f"{MOST_REQUESTS} code edits",
    JSON,
)


class Load(NamedTuple):
    """Requests that arrive together."""

    name: str
    prompts: Callable[[int], list[Any]]
    """Of the number of the repeat."""
    params: SamplingParams
    settings: Sequence[str]
    repeats: int


class TimedStep(NamedTuple):
    """A step of a run."""

    rows: int
    seconds: float
    is_settled: bool = True
    """False if it was recorded: others of its kind will not take as long."""


class Run(NamedTuple):
    """One run of a load."""

    sample: Sample
    num_drafted: int
    num_accepted: int
    steps: Sequence[TimedStep] = ()
    """Those after the prompts."""


class StepClock:
    """Times the steps of a run that begin when every request has its first token."""

    def __init__(
        self, num_requests: int, num_drafted: Callable[[], int], is_settled: Callable[[], bool] = lambda: True
    ) -> None:
        """num_drafted: drafted tokens so far; is_settled: of the last step."""
        self.steps: list[TimedStep] = []
        self._num_requests, self._num_drafted, self._is_settled = num_requests, num_drafted, is_settled
        self._started: set[int] = set()
        self._last, self._drafted = time.perf_counter(), 0

    def tick(self, touched: Iterable[int]) -> None:
        """A step has ended that gave tokens to the requests `touched`."""
        now, drafted, requests = time.perf_counter(), self._num_drafted(), set(touched)
        if len(self._started) == self._num_requests:
            rows = len(requests) + drafted - self._drafted
            self.steps.append(TimedStep(rows, now - self._last, self._is_settled()))
        self._started |= requests
        self._last, self._drafted = now, drafted


@dataclass
class Study:
    """The runs of one model."""

    model: str
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    """By load and setting; the n-th runs of all settings belong to the same repeat."""

    def ratio(self, load: str, setting: str, of: Callable[[Sample], float], reference: str = NONE) -> float | None:
        """The median, over the repeats, of what `of` gives relative to `reference`."""
        pairs = zip(self.runs.get((load, setting), ()), self.runs.get((load, reference), ()), strict=False)
        ratios = [of(own.sample) / of(other.sample) for own, other in pairs]
        return median(ratios) if ratios else None

    def typical_ratio(self, load: str, setting: str, reference: str) -> float | None:
        """Tokens per second of `setting` relative to `reference` if each step took its typical time."""
        typical = self._typical_seconds(load)
        own, other = (self._by_typical_steps(self.runs.get((load, name), ()), typical) for name in (setting, reference))
        return own / other if own and other else None

    def _typical_seconds(self, load: str) -> dict[int, float]:
        """The median of the load's steps of each number of rows, without recorded ones if there are others."""
        found: dict[int, list[TimedStep]] = {}
        for (name, _), runs in self.runs.items():
            for step in itertools.chain(*(run.steps for run in runs if name == load)):
                found.setdefault(step.rows, []).append(step)
        return {rows: median(_settled_seconds(steps)) for rows, steps in found.items()}

    @staticmethod
    def _by_typical_steps(runs: Sequence[Run], typical: Mapping[int, float]) -> float:
        seconds = sum(typical[step.rows] for run in runs for step in run.steps)
        return sum(run.sample.output_tokens for run in runs) / seconds if seconds else 0.0


def _settled_seconds(steps: Sequence[TimedStep]) -> list[float]:
    return [step.seconds for step in steps if step.is_settled] or [step.seconds for step in steps]


def tokens_per_second(sample: Sample) -> float:
    """Output tokens."""
    return sample.output_tokens / sample.seconds


def tpot(sample: Sample) -> float:
    """Seconds per output token after the first."""
    return sample.tpot


# --- loads ----------------------------------------------------------------------------------------------------------


def loads_of(is_counting: bool, vocab_size: int, tokens: int, repeats: int) -> list[Load]:
    """The loads of a model. tokens: of each output."""
    plain = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    hot = replace(plain, temperature=0.0 if is_counting else 1.5, seed=1)

    def edits(count: int) -> Callable[[int], list[Any]]:
        def make(repeat: int) -> list[Any]:
            if is_counting:
                found = itertools.islice(code_edits(200, repeat), count)
                return [edit_prompt(edit, vocab_size, tokens, repeat) for edit in found]
            items = itertools.islice(REPETITIVE["code_edit"](200, tokens, repeat), count)
            return [item.content for item in items]

        return make

    def unknown(count: int) -> Callable[[int], list[Any]]:
        def make(repeat: int) -> list[Any]:
            first = 10**6 * count + 100 * (repeat + 1)
            return [random_prompt(vocab_size, 64, tokens, first + each) for each in range(count)]

        return make

    every = tuple(SETTINGS)
    edit, text, texts, few, many, _ = LOADS
    return [
        Load(edit, edits(1), plain, every, repeats),
        Load(text, unknown(1), hot, CHOSEN, 2 * repeats),
        Load(texts, unknown(MOST_REQUESTS), hot, CHOSEN, repeats),
        Load(few, edits(4), plain, COUNTS, repeats),
        Load(many, edits(MOST_REQUESTS), plain, COUNTS, repeats),
    ]


def order(load: Load) -> Iterator[tuple[int, str]]:
    """(repeat, setting): the first round, in which steps are recorded, is not counted; each starts with another
    setting."""
    for repeat in range(-1, load.repeats):
        first = repeat % len(load.settings)
        for setting in (*load.settings[first:], *load.settings[:first]):
            yield repeat, setting


# --- measuring ------------------------------------------------------------------------------------------------------


class Speculations:
    """Speculation of every setting on one engine. Each keeps what it has learned, as in a server that goes on."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self._made: dict[str, Speculation | None] = {}

    def use(self, setting: str) -> None:
        """Give rank 0 this speculation and an empty prefix cache, as a start with it would."""
        own = self.engine._engine
        assert own is not None
        is_emptied = own.scheduler.allocator.reset_prefix_cache()
        assert is_emptied, "requests run"
        if setting not in self._made:
            config = replace(own.config, speculation=SETTINGS[setting])
            self._made[setting] = start_speculation(config, own.rank, own.requests, own.policies)
        own.speculation = chosen = self._made[setting]
        if chosen is not None:
            own.requests.on_end = chosen.forget
            chosen.reset_stats()


def measure(speculations: Speculations, load: Load, setting: str, repeat: int) -> Run:
    """Run a load once."""
    speculations.use(setting)
    engine = speculations.engine
    own = engine._engine
    assert own is not None
    prompts = load.prompts(repeat)
    stats = own.speculation.stats if own.speculation is not None else None

    def num_drafted() -> int:
        return stats.num_draft_tokens if stats else 0

    clock = StepClock(len(prompts), num_drafted, lambda: own.worker.is_settled)
    sample = sample_of(engine.generate(prompts, load.params, on_step=clock.tick))
    return Run(sample, num_drafted(), stats.num_accepted_tokens if stats else 0, clock.steps)


def study(speculations: Speculations, loads: Sequence[Load], found: Study, is_over: Callable[[], bool]) -> None:
    """Run all loads, as long as there is time."""
    for load in loads:
        for repeat, setting in order(load):
            if is_over():
                return
            run = measure(speculations, load, setting, repeat)
            if repeat >= 0:
                found.runs.setdefault((load.name, setting), []).append(run)


# --- report ---------------------------------------------------------------------------------------------------------


def table_of(found: Study) -> Table:
    """One row per load and setting, with medians and ratios."""
    table = Table(title=found.model, box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
    for column in ("load", "speculation", "TPOT ms", "ratio", "tokens/s", "ratio", "accepted of drafted"):
        table.add_column(column, justify="left" if column in ("load", "speculation") else "right", no_wrap=True)
    for (load, setting), runs in found.runs.items():
        drafted, accepted = sum(run.num_drafted for run in runs), sum(run.num_accepted for run in runs)
        table.add_row(
            load,
            setting,
            f"{1e3 * median(tpot(run.sample) for run in runs):.1f}",
            _shown(found.ratio(load, setting, tpot)),
            f"{median(tokens_per_second(run.sample) for run in runs):.1f}",
            _shown(found.ratio(load, setting, tokens_per_second)),
            f"{accepted} of {drafted}" if drafted else "-",
        )
    return table


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}x"


def verdicts(found: Study) -> Iterator[str]:
    """What was aimed at, and what came out."""
    edit, text, saturated, few, many, _ = LOADS
    for setting in CHOSEN[1:]:
        yield _verdict(f"{edit}, {setting}: TPOT", found.ratio(edit, setting, tpot), 0.5, True)
        yield _verdict(f"{text}, {setting}: TPOT", found.ratio(text, setting, tpot), 1.03, True)
        speed = found.ratio(saturated, setting, tokens_per_second)
        yield _verdict(f"{saturated}, {setting}: tokens/s", speed, 0.98, False)
    for load in (edit, few, many):
        fixed = [f"ngram, {count} tokens" for count in FIXED]
        measured = _inverse([found.ratio(load, name, tokens_per_second, "ngram") for name in fixed])
        typical = _inverse([found.typical_ratio(load, name, "ngram") for name in fixed])
        beside = "" if measured is None else f" ({measured:.3f}x by the clock)"
        what = f"{load}, auto against the best fixed number, by typical step times: tokens/s"
        yield _verdict(what, typical, 0.97, False) + beside


def _inverse(ratios: Sequence[float | None]) -> float | None:
    """Of the largest that is known."""
    known = [ratio for ratio in ratios if ratio is not None]
    return 1 / max(known) if known else None


def _verdict(what: str, ratio: float | None, aim: float, is_most: bool) -> str:
    if ratio is None:
        return f"not measured  {what}"
    is_met = ratio <= aim if is_most else ratio >= aim
    return (
        f"{'met' if is_met else 'MISSED':12}  {what} {ratio:.3f}x, aim: {'at most' if is_most else 'at least'} {aim}x"
    )


# --- command --------------------------------------------------------------------------------------------------------


def start(path: Path, ranks: int) -> InferenceEngine:
    """An engine with graphs of as many rows as the most drafted tokens need."""
    return init_inference(
        str(path),
        parallel={"sp": ranks},
        speculation={"method": "ngram"},
        policy={"name": "adaptive", "profile": None, "calibration_seconds": 15},
        scheduler={"max_num_seqs": MOST_REQUESTS, "max_num_batched_tokens": 1024},
        model={"max_model_len": 2048},
        cache={"num_blocks": 1024},
    )


def smollm2() -> Path:
    """The checkpoint, from a package that ships it."""
    from benchmarks.compare_peers.models import SMOLLM2, find_model

    return find_model(SMOLLM2, cache_folder("peers"))


MODELS: dict[str, Callable[[], Path]] = {
    "smollm2-135m": smollm2,
    **{f"{shape}-counting": partial(counting_model, shape) for shape in ("llama-0.5b", "llama-60m")},
}
DEFAULT_MODELS = ["llama-60m-counting", "smollm2-135m"]  # the short one first: what it leaves of the time is used


def main() -> None:
    """Measure one model after the other, print each when it is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=DEFAULT_MODELS)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS, help="of these only (default: all)")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default 2)")
    parser.add_argument("--minutes", type=float, default=5.5, help="no run starts after this time (default 5.5)")
    parser.add_argument("--repeats", type=int, default=2, help="repetitions of each measurement (default 2)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each output (default 96)")
    parser.add_argument("--documents", type=int, default=200, help="JSON documents to write (default 200)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console, load, started = make_console(0), LoadMeter(), time.monotonic()
    console.print(f"{options.ranks} ranks, {device_name(torch.device('cpu'))}\n")
    with suppress(KeyboardInterrupt):
        for number, name in enumerate(options.models, start=1):
            end = started + 60 * options.minutes * number / len(options.models)
            _compare(name, options, console, partial(_has_passed, end))
    console.print(f"{time.monotonic() - started:.0f} s; other programs kept {load.foreign_cores():.2f} cores busy")


def _has_passed(moment: float) -> bool:
    return time.monotonic() > moment


def _compare(name: str, options: argparse.Namespace, console: Any, is_over: Callable[[], bool]) -> None:
    is_counting = name != "smollm2-135m"
    found, documents = Study(name), JsonStudy(options.documents)
    try:
        with start(MODELS[name](), options.ranks) as engine:
            speculations = Speculations(engine)
            if not is_counting and JSON in options.loads:
                documents.run(engine, lambda chosen: speculations.use("ngram" if chosen else NONE), is_over)
            loads = loads_of(is_counting, engine.vocab_size, options.tokens, options.repeats)
            study(speculations, [load for load in loads if load.name in options.loads], found, is_over)
    finally:
        console.print(table_of(found))
        lines = [*verdicts(found), *([] if is_counting else documents.lines())]
        console.print("\n".join(["", *lines, ""]))


if __name__ == "__main__":
    main()
