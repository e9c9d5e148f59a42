"""What an offline benchmark has measured so far: shown and written when it ends, or is stopped."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ulysses_infer.atomic_files import write_atomically
from ulysses_infer.bench.load import LoadMeter
from ulysses_infer.bench.report import QUANTITIES, as_json, comparison, median_makespan
from ulysses_infer.bench.step_sizes import savings, size_table, sizes_as_json, summed
from ulysses_infer.bench.workload import Sample, Workload
from ulysses_infer.config import Config
from ulysses_infer.console.banner import shown_path
from ulysses_infer.console.screen import mode_name
from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.job.start_rank import choose_device

MAX_FOREIGN_CORES = 0.1  # busy cores of other programs above which a warning is printed
WARM_UP = -1  # number of the repeat that is not counted


class Results:
    """The finished runs of every mode. Rank 0 shows and writes them."""

    def __init__(
        self, options: argparse.Namespace, config: Config, workload: Workload, console: Console, file: Path | None
    ) -> None:
        """console: quiet on other ranks than 0, which have no `file` either."""
        self.workload = workload
        """What is measured; smaller than what the options name if a time is given."""
        self.samples: dict[str, list[Sample]] = {mode: [] for mode in options.modes}
        self._options, self._config, self._console, self._file = options, config, console, file
        self._meter = LoadMeter()
        self._showing, self._is_shown = threading.Lock(), False
        self._progress = _RunProgress(options, console)

    def __enter__(self) -> Results:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, mode: str, repeat: int) -> None:
        """A run starts."""
        self._progress.begin(mode, repeat)

    def add(self, mode: str, repeat: int, sample: Sample) -> None:
        """Keep what a run measured, and write all results so far."""
        if repeat != WARM_UP:
            self.samples[mode].append(sample)
            if self._file is not None:
                self._write(self._file)
        self._progress.end(mode, repeat, sample)  # what is said to have ended is kept

    def show(self) -> None:
        """Print the results of the modes that have any. Has no effect if called again."""
        self._progress.stop()
        with self._showing:  # a signal's thread may call it while the main thread does
            if not self._is_shown:
                self._print({mode: list(own) for mode, own in self.samples.items() if own}, self._meter.foreign_cores())
            self._is_shown = True

    def show_stopped(self) -> None:
        """Print the results so far, because the benchmark is stopped."""
        self._progress.stop()
        if any(self.samples.values()):
            self._console.print("stopped: these are the results so far")
            self.show()
        else:
            self._console.print("stopped before a measurement had ended; --seconds N makes them shorter")

    def _print(self, samples: Mapping[str, Sequence[Sample]], foreign: float) -> None:
        console, kind = self._console, self._options.kind
        console.print(f"{_heading(self._options, self.workload, samples, self._config)}\n")
        console.print(comparison(kind, samples, {mode: _label(mode, self._config) for mode in samples}))
        if foreign > MAX_FOREIGN_CORES:
            console.print(f"\n  other programs kept {foreign:.1f} cores busy: small differences are not reliable")
        if kind == "rollouts":
            print_switching(console, samples)

    def _write(self, path: Path) -> None:
        options, config, workload = self._options, self._config, self.workload
        samples = {mode: own for mode, own in self.samples.items() if own}
        record = {
            "benchmark": options.kind,
            "model": shown_path(config.model.path),
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "num_prompts": workload.num_prompts,
            "samples": workload.samples,
            "tail": workload.tail,
            "repeats": options.repeats,
            "sp": config.parallel.sp,
            "tp": config.parallel.tp,
            "threshold_tokens": config.policy.threshold_tokens,
            "threads_per_rank": torch.get_num_threads(),
            "foreign_busy_cores": self._meter.foreign_cores(),
            "device": device_name(choose_device(config.runtime.device)),
            "modes": as_json(options.kind, samples),
            "steps": sizes_as_json({mode: [sample.steps for sample in own] for mode, own in samples.items()}),
        }
        write_atomically(path, json.dumps(record, indent=2) + "\n")


class _RunProgress:
    """What runs now: a bar per mode on a terminal, a line per finished run elsewhere."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._repeats, self._quantity, self._console = options.repeats, QUANTITIES[options.kind][0], console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        latest = TextColumn("{task.fields[latest]}")
        self._bars = Progress(*columns, latest, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {
            mode: self._bars.add_task(mode, total=options.repeats + 1, start=False, latest="") for mode in options.modes
        }

    def start(self) -> None:
        """Show the bars."""
        self._bars.start()

    def stop(self) -> None:
        """Remove the bars."""
        self._bars.stop()

    def begin(self, mode: str, repeat: int) -> None:
        """A run starts: its mode's clock runs."""
        if repeat == WARM_UP:
            self._bars.start_task(self._tasks[mode])
        self._bars.update(self._tasks[mode], latest="warming up" if repeat == WARM_UP else "measuring")

    def end(self, mode: str, repeat: int, sample: Sample) -> None:
        """A run has ended."""
        quantity = self._quantity
        result = f"{quantity.title} {quantity.value(sample):.{quantity.digits}f}"
        self._bars.update(self._tasks[mode], advance=1, latest=result)
        if not self._console.is_terminal:
            stage = "warm-up" if repeat == WARM_UP else f"{repeat + 1} of {self._repeats}"
            self._console.print(f"  {stage:8} {mode:8} {result}, {sample.seconds:.1f} s")


def _heading(
    options: argparse.Namespace, workload: Workload, samples: Mapping[str, Sequence[Sample]], config: Config
) -> str:
    counts = {len(own) for own in samples.values()}
    repeats = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    return (
        f"{options.kind}: {sizes_in_words(workload)}, medians of {repeats}, {config.parallel.world_size} x "
        f"{_threads(torch.get_num_threads())}, {'' if workload.samples > 1 else 'no '}prefix caching; "
        f"{device_name(choose_device(config.runtime.device))}"
    )


def sizes_in_words(workload: Workload) -> str:
    """`4 prompts x 8 samples at once, 256 tokens in, 64 out (median, at most 512)`."""
    requests = f"{workload.num_prompts} concurrent requests" if workload.num_prompts > 1 else "a single request"
    if workload.samples > 1:
        requests = f"{workload.num_prompts} prompts x {workload.samples} samples at once"
    tail = f" (median, at most {workload.sorted_output_lens[-1]})" if workload.tail else ""
    return f"{requests}, {workload.input_len} tokens in, {workload.output_len} out{tail}"


def print_switching(console: Console, samples: Mapping[str, Sequence[Sample]]) -> None:
    """What the steps of each size took in both static modes, and what switching can gain; nothing without both."""
    if not {"tp", "sp"} <= samples.keys():
        return
    steps = {mode: summed(sample.steps for sample in own) for mode, own in samples.items()}
    best = min(("tp", "sp"), key=lambda mode: median_makespan(samples[mode]))
    other = "sp" if best == "tp" else "tp"
    seconds, num_runs = median_makespan(samples[best]), len(samples[best])
    least = seconds - savings(steps[best], steps[other]) / num_runs
    console.print("")
    console.print(size_table(steps["tp"], steps["sp"], num_runs))
    console.print(
        f"\n  best static mode: {best}, {seconds:.2f} s; with the faster mode for steps of every size: {least:.2f} s, "
        f"{least / seconds:.3f}x"
    )
    for mode in ("shift", "adaptive"):
        if mode in samples:
            console.print(f"  {mode}: {median_makespan(samples[mode]) / seconds:.3f}x of the best static mode")


def all_threads(config: Config) -> int:
    """The threads of all ranks together, for the engine on a single rank."""
    return torch.get_num_threads() * config.parallel.world_size


def _label(mode: str, config: Config) -> str:
    layout = config.parallel.layout
    labels = {
        "sp": f"sp      {mode_name(layout.base)}",
        "tp": f"tp      {mode_name(layout.shift)}",
        "shift": f"shift   {mode_name(layout.base)} > {config.policy.threshold_tokens} tokens",
        "adaptive": "adaptive",
        "single": f"single  1 rank, {_threads(all_threads(config))}",
    }
    return labels[mode]


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
