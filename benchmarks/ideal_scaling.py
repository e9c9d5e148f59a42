"""Scaling efficiency of a step on W ranks: `python -m benchmarks.ideal_scaling [--ranks 2]`.

The same steps run on one rank with one thread and on W ranks with one thread each, alternately, with a new start each
time: large prefills in the base mode (SP), decodes in full TP. The ideal is the time of one rank / W. It is divided by
three times of the W ranks:

- `whole`: the whole step, exchanges included;
- `slowest`: the longest time that any rank spent outside exchanges. It includes load imbalance, because the other ranks
  wait for the slowest one within their exchanges. This is the ratio to judge by;
- `rank 0`: the step less the time of rank 0 in exchanges, waiting included, which is too optimistic for uneven ranks.

Exchanges include packing the data to send. `crowd` is the time of one rank while all cores run the same step
independently, relative to its time alone: the cost of sharing memory bandwidth and clock frequency.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import common_options, model_options, model_path
from ulysses_infer import InferenceEngine, init_inference
from ulysses_infer.bench.load import LoadMeter
from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.engine.calibration_points import Point
from ulysses_infer.engine.engine import Engine
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.step_plan import StepPlan

TARGET = 0.95
CONTEXT = 512
WARM_UPS = 2
WIDTH = 120  # of a table that goes into a file
FILL_SECONDS = 120.0  # limit on filling the cache: pages that were never written are too fast to read


class Case(NamedTuple):
    """A step and how the ranks split it."""

    name: str
    point: Point
    full_tp: bool

    def mode(self, num_ranks: int) -> Mode:
        """Its mode on `num_ranks` ranks."""
        return Mode(1, num_ranks) if self.full_tp else Mode(num_ranks, 1)


def cases(prefills: Sequence[int], decodes: Sequence[int]) -> list[Case]:
    """SP prefills with these numbers of tokens, and TP decodes with these numbers of requests."""
    return [
        *(Case(f"SP prefill {count}", Point(0, 0, ((0, count),)), False) for count in prefills),
        *(Case(f"TP decode {count}", Point(count, CONTEXT), True) for count in decodes),
    ]


class Spent(NamedTuple):
    """Seconds of one run of a step on one rank."""

    step: float
    exchanges: float

    @property
    def work(self) -> float:
        """Seconds outside exchanges."""
        return self.step - self.exchanges


class Found(NamedTuple):
    """The measured times of a case: medians over all runs, in seconds."""

    alone: float
    crowd: float
    whole: float
    slowest: float
    rank0: float

    def shares(self, num_ranks: int) -> dict[str, float]:
        """The ideal divided by each of the three times; 1 is perfect."""
        ideal = self.alone / num_ranks
        return {"whole": ideal / self.whole, "slowest": ideal / self.slowest, "rank 0": ideal / self.rank0}


Runs = dict[str, list[list[Spent]]]
"""By case and run, the times of each rank."""


def found_of(name: str, alone: Runs, crowd: Runs, ranks: Runs) -> Found:
    """The medians of one case."""
    return Found(
        alone=median(run[0].step for run in alone[name]),
        crowd=median(spent.step for run in crowd[name] for spent in run),
        whole=median(run[0].step for run in ranks[name]),
        slowest=median(max(spent.work for spent in run) for run in ranks[name]),
        rank0=median(run[0].work for run in ranks[name]),
    )


# -- one process ---------------------------------------------------------------------------------------------------


class Recorder:
    """Records the duration of every step on this rank."""

    def __init__(self, engine: InferenceEngine) -> None:
        assert engine._rank is not None
        worker = engine._rank.worker
        self.steps: list[Spent] = []
        self._run: Callable[..., Any] = worker.run
        self._clock = worker.groups.clock
        worker.run = self._timed  # type: ignore[assignment, method-assign]

    def _timed(self, plan: StepPlan, *arguments: Any) -> Any:
        self._clock.take()
        started = time.perf_counter()
        result = self._run(plan, *arguments)
        self.steps.append(Spent(time.perf_counter() - started, sum(self._clock.take().values())))
        return result


def run_cases(engine: Engine, recorder: Recorder, wanted: Sequence[Case], repeats: int) -> dict[str, list[int]]:
    """Run every case on all ranks; returns the indices of its recorded steps. Rank 0's part."""
    num_ranks = engine.config.parallel.world_size
    found: dict[str, list[int]] = {}
    with engine.policies.calibration() as calibration, calibration.prepared(FILL_SECONDS):
        for case in wanted:
            for turn in range(WARM_UPS + repeats):
                calibration.step(case.point, case.mode(num_ranks))
                if turn >= WARM_UPS:
                    found.setdefault(case.name, []).append(len(recorder.steps) - 1)
    return found


def run_part(path: str, num_ranks: int, wanted: Sequence[Case], repeats: int, output: Path) -> None:
    """One rank's process: run the cases and write the rank's times to `output`."""
    blocks = 2 + max(sum(-(-(start + count) // 16) for start, count in case.point.sequences) for case in wanted)
    scheduler = {"max_num_batched_tokens": max(case.point.shape.num_tokens for case in wanted), "max_num_seqs": 512}
    with init_inference(
        path,
        parallel={"sp": num_ranks},
        cache={"num_blocks": blocks},
        scheduler=scheduler,
        runtime={"threads_per_rank": 1},
    ) as engine:
        recorder = Recorder(engine)
        runs = engine._on_rank_0(lambda own: run_cases(own, recorder, wanted, repeats))
        spent = {name: [recorder.steps[index] for index in indices] for name, indices in runs.items()}
    output.write_text(json.dumps(spent), encoding="utf-8")


# -- all processes -------------------------------------------------------------------------------------------------


def launch(options: argparse.Namespace, path: str, num_ranks: int, copies: int) -> Runs:
    """Run the cases on `copies` engines of `num_ranks` ranks each; returns the times of each process."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(index) for index in range(num_ranks * copies)]
        processes = []
        for index, output in enumerate(outputs):
            command = [
                sys.executable,
                __file__,
                "--part",
                str(output),
                "--model",
                path,
                "--ranks",
                str(num_ranks),
                "--repeats",
                str(options.repeats),
                "--prefills",
                options.prefills,
                "--decodes",
                options.decodes,
            ]
            processes.append(subprocess.Popen(command, env=rank_environment(index, num_ranks, port)))
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            sys.exit(f"error: a process ended with code {next(filter(None, codes))}; see above")
        spent = [json.loads(output.read_text(encoding="utf-8")) for output in outputs]
    return {
        name: [[Spent(*own[name][run]) for own in spent] for run in range(len(spent[0][name]))] for name in spent[0]
    }


def rank_environment(index: int, num_ranks: int, port: int) -> dict[str, str]:
    """The launcher's environment variables for rank `index`; none for an engine of one rank."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if num_ranks > 1:
        variables |= {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return variables


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def merge(parts: Sequence[Runs]) -> Runs:
    """The runs of all rounds, by case."""
    return {name: [run for part in parts for run in part[name]] for name in parts[0]}


def report(found: dict[str, Found], num_ranks: int) -> Table:
    """One row per case: times in ms and the ratios, green if `slowest` reaches the target."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False)
    titles = ("step", "1 rank ms", "crowd", f"{num_ranks} ranks ms", "exchanges ms", "whole", "slowest", "rank 0")
    for title in titles:
        result.add_column(title, justify="left" if title == "step" else "right", no_wrap=True)
    for name, case in found.items():
        shares = case.shares(num_ranks)
        verdict = "green" if shares["slowest"] >= TARGET else "red"
        result.add_row(
            name,
            f"{case.alone * 1e3:.2f}",
            f"{case.crowd / case.alone:.2f}x",
            f"{case.whole * 1e3:.2f}",
            f"{(case.whole - case.rank0) * 1e3:.2f}",
            f"{shares['whole']:.3f}",
            f"[bold {verdict}]{shares['slowest']:.3f}[/]",
            f"{shares['rank 0']:.3f}",
        )
    return result


def sizes(text: str) -> list[int]:
    """`512,2048` as numbers; an empty list for an empty text."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Run all processes in rounds and print; with --part, run one of them."""
    end_children_with_this_process()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        parents=[model_options("llama-0.5b"), common_options(ranks=2, repeats=7, output=None)],
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of starts of each engine (default 3)")
    parser.add_argument("--prefills", default="512,2048,4096", help="tokens of the SP steps (512,2048,4096)")
    parser.add_argument("--decodes", default="1,8,32", help="requests of the TP steps (1,8,32)")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = cases(sizes(options.prefills), sizes(options.decodes))
    path = model_path(options)
    if options.part is not None:
        run_part(path, options.ranks, wanted, options.repeats, options.part)
        return
    others = LoadMeter()
    parts: dict[str, list[Runs]] = {"alone": [], "crowd": [], "ranks": []}
    for _ in range(options.rounds):
        parts["alone"].append(launch(options, path, 1, 1))
        parts["crowd"].append(launch(options, path, 1, options.ranks))
        parts["ranks"].append(launch(options, path, options.ranks, 1))
    alone, crowd, ranks = (merge(parts[name]) for name in ("alone", "crowd", "ranks"))
    found = {case.name: found_of(case.name, alone, crowd, ranks) for case in wanted}
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(
        f"{Path(path).name}: time of one rank / {options.ranks}, relative to the time of {options.ranks} ranks"
    )
    console.print(report(found, options.ranks))
    console.print(f"other programs kept {others.foreign_cores():.2f} cores busy")
    if options.output is not None:
        values = {name: case._asdict() | case.shares(options.ranks) for name, case in found.items()}
        options.output.write_text(json.dumps(values, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
