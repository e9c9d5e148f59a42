"""The engine against its peers on the same checkpoints and processors, in one run.

    python -m benchmarks.compare_peers               # measures for up to 14 minutes, once all is prepared
    python -m benchmarks.compare_peers --quick       # up to 6 minutes: the 60 M model, without the slow starters
    python -m benchmarks.compare_peers --level x86-64-v3                # all engines held to AVX2
    python -m benchmarks.compare_peers --models llama-60m --peers ours-tp,vllm,vllm-tp --repeats 3
    python -m benchmarks.compare_peers --check       # first: do all give the same tokens in float32?

What takes long only once comes first, before the time counts: peers are installed or compiled, checkpoints made, and
each program that was never started here with a checkpoint is started, so that it compiles and converts what it needs.

Random token prompts, greedy, end of text ignored. Every engine is one process (or one per thread), started once and
stopped while another is measured; rounds over all of them are repeated. The sizes of the requests are the largest of
four choices for which all rounds should fit the time (`--seconds`), by the machine's measured rates; when the time is
up, no further measurement begins. Each checkpoint gets an equal share of the time that is left. An interrupted run
(Ctrl-C, SIGTERM) ends all processes, and reports and writes what was measured; results are also written after every
round.

Contenders in 16, 8 and 4 bits are compared among themselves. The machine's limit is computed from the best rate of all
types of numbers and rounds, for weights of so many bits without scales, and is never worse than what an engine of as
many bits or more reached. K-quants need rows of a multiple of 256 values; llama.cpp stores other matrices in more bits.

A peer that cannot be installed or run here is named with the reason, and the others go on. llama.cpp is compiled here,
for this processor or (`--level`) for AVX2; ik_llama.cpp comes as a wheel, which is compiled for AVX2. vLLM needs
libtcmalloc_minimal preloaded: it is taken from the system, or from `vllm/lib` in the folder of environments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from benchmarks.compare_peers.arguments import parse
from benchmarks.compare_peers.comparison import Comparison
from benchmarks.compare_peers.report import as_values, markdown, notes, table
from benchmarks.processor import processor
from ulysses_infer.atomic_files import write_atomically
from ulysses_infer.child_processes import end_children_with_this_process

WIDTH = 230  # of a table written to a file


@dataclass
class Results:
    """What is printed and written, model after model."""

    options: argparse.Namespace
    console: Console
    values: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)

    def write(self, found: Comparison) -> None:
        """Write all results so far, with those of one more model, or more of them."""
        options, folder = self.options, self.options.output
        self.values |= {"machine": processor(), "level": options.level, "threads": options.threads}
        self.values |= {"overrides": options.overrides}
        self.values.setdefault("models", {})[found.name] = as_values(found.measured, found.limits)
        self.sections[found.name] = markdown(found.title, found.measured, found.limits)
        command = f"`{' '.join(['python -m benchmarks.compare_peers', *sys.argv[1:]])}` ({processor()})\n"
        write_atomically(folder / "peers.json", json.dumps(self.values, indent=1))
        write_atomically(folder / "peers.md", "\n".join([command, *self.sections.values()]))

    def show(self, found: Comparison) -> None:
        """Print a model's table and notes."""
        self.console.print(f"\n[bold]{found.title}[/bold]", highlight=False)
        self.console.print(table(found.measured, found.limits))
        for line in [f"processor: {processor()}", *notes(found.measured)]:
            self.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Measure model after model; print and write after each."""
    end_children_with_this_process()
    options = parse((__doc__ or "").split("\n\n")[0], sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the processes and keep what was measured
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < options.threads:
        sys.exit(f"error: --threads {options.threads}: this process may use {len(cores)} cores; give as many or fewer")
    os.sched_setaffinity(0, cores[: options.threads])
    options.output.mkdir(parents=True, exist_ok=True)
    options.environments.mkdir(parents=True, exist_ok=True)
    comparisons = [Comparison(name, options, console) for name in options.models]
    with keep_when_stopped(options):
        for found in comparisons:
            found.prepare()
    if options.stopped:
        sys.exit("error: stopped before anything was measured")
    measure(comparisons, Results(options, console), options)
    console.print(f"written to {options.output}/peers.json and peers.md")
    if options.stopped:
        sys.exit(128 + signal.SIGINT)


def measure(comparisons: Sequence[Comparison], results: Results, options: argparse.Namespace) -> None:
    """Measure, print and write one after the other; each gets an equal share of the time that is left."""
    until = time.monotonic() + options.seconds
    waiting = [found for found in comparisons if found.is_prepared]
    for found in comparisons:
        seconds = max(until - time.monotonic(), 0.0) / max(len(waiting), 1)
        waiting = [other for other in waiting if other is not found]
        with keep_when_stopped(options):
            found.run(seconds, after_round=lambda found=found: results.write(found))  # type: ignore[misc]
        results.write(found)
        results.show(found)
        if options.stopped:
            break


@contextmanager
def keep_when_stopped(options: argparse.Namespace) -> Iterator[None]:
    """Goes on after an interruption inside, which is noted in `options.stopped`."""
    try:
        yield
    except KeyboardInterrupt:
        options.stopped = True


if __name__ == "__main__":
    main()
