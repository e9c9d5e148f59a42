"""Growth of the engine's costs: `python -m benchmarks.plot_growth --random-model llama-60m --sp 2 --seconds 300`.

Plots step time over prefill tokens, decoding requests and context length (synthetic steps as in calibration, in every
mode alternately); throughput over concurrent requests; memory of the ranks over model and cache size. Writes growth.png
and growth.csv to `--output`. If time is short, the largest points are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from rich.console import Console

from benchmarks.arguments import common_options, model_options, model_path
from ulysses_infer import InferenceEngine, SamplingParams, init_inference
from ulysses_infer.bench.load import LoadMeter
from ulysses_infer.bench.random_model import random_model
from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.engine.calibration_points import Limits, Point
from ulysses_infer.engine.engine import Engine
from ulysses_infer.parallel.layout import Mode

BLOCK_SIZE = 16
CACHED_TOKENS = 32768  # maximum number of tokens that calibration caches
SHARES = {"fill": 0.15, "tokens": 0.2, "requests": 0.2, "context": 0.2, "throughput": 0.25}  # of the time
MOST_ROUNDS = 9
GROWTH = 3.0  # assumed ratio of a point's time to that of the previous point, until it is measured
INPUT_LEN, OUTPUT_LEN = 64, 32
MEMORY_BLOCKS = (256, 512, 1024)
Visit = Callable[[Point], dict[Mode, float]]


class Row(NamedTuple):
    """One point of a plot."""

    sweep: str
    series: str
    x: float
    value: float
    low: float
    high: float


def sweep_points(limits: Limits, max_num_seqs: int) -> dict[str, list[tuple[int, Point]]]:
    """The (x, step) points of each sweep within `limits`, smallest first."""
    context_of_many = CACHED_TOKENS // max_num_seqs - BLOCK_SIZE  # all of them fit
    sweeps = {
        "tokens": [(count, Point(0, 0, ((0, count),))) for count in powers(16, 4096)],
        "requests": [(count, Point(count, context_of_many)) for count in powers(1, max_num_seqs)],
        "context": [(length, Point(4, min(length, limits.context))) for length in powers(128, 8192)],
    }
    return {name: [(x, point) for x, point in points if fits(point, limits)] for name, points in sweeps.items()}


def powers(first: int, last: int) -> list[int]:
    """`first` and its doubles up to `last`."""
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found


def fits(point: Point, limits: Limits) -> bool:
    """Whether calibration may run this step."""
    ends = [start + count for start, count in point.sequences]
    return (
        point.shape.num_tokens <= limits.num_tokens
        and len(ends) <= limits.num_sequences
        and max(ends) <= limits.context
        and sum(-(-end // BLOCK_SIZE) * BLOCK_SIZE for end in ends) <= limits.cached
    )


def run_sweep(
    visit: Visit, points: Sequence[tuple[int, Point]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[tuple[int, Mode], list[float]]:
    """Visit the points in rounds for about `seconds`; a point that would exceed the time left is not started."""
    deadline = clock() + seconds
    costs: dict[int, float] = {}
    times: dict[tuple[int, Mode], list[float]] = {}
    for _ in range(MOST_ROUNDS):
        before = 0.0
        for x, point in points:
            if clock() + costs.get(x, GROWTH * before) > deadline:
                break
            started = clock()
            for mode, took in visit(point).items():
                times.setdefault((x, mode), []).append(took)
            before = costs[x] = clock() - started
    return times


def rows_of(sweep: str, times: dict[tuple[int, Mode], list[float]]) -> list[Row]:
    """Medians and ranges in milliseconds."""
    return [
        Row(sweep, f"SP {mode.sp} x TP {mode.tp}", x, *(1e3 * value for value in (median(own), min(own), max(own))))
        for (x, mode), own in sorted(times.items())
    ]


def step_times(engine: Engine, seconds: float) -> list[Row]:
    """The three sweeps over synthetic steps. Rank 0's part."""
    rows: list[Row] = []
    with engine.policies.calibration() as calibration, calibration.prepared(SHARES["fill"] * seconds) as (limits, _):
        for name, points in sweep_points(limits, engine.config.scheduler.max_num_seqs).items():
            times = run_sweep(lambda point: calibration.visit(point, 1)[0], points, SHARES[name] * seconds)
            rows += rows_of(name, times)
    return rows


def throughput(engine: InferenceEngine, largest: int, seconds: float) -> list[Row]:
    """Prompt and output tokens per second over the number of concurrent requests."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True, detokenize=False)
    draw = random.Random(0)

    def run(count: int) -> float:
        prompts = [[draw.randrange(engine.vocab_size) for _ in range(INPUT_LEN)] for _ in range(count)]
        started = time.perf_counter()
        engine.generate(prompts, params)
        return count * (INPUT_LEN + OUTPUT_LEN) / (time.perf_counter() - started)

    run(1)
    deadline = time.perf_counter() + seconds
    found: dict[int, list[float]] = {}
    costs: dict[int, float] = {}
    for _ in range(MOST_ROUNDS):
        before = 0.0
        for count in powers(1, largest):
            if time.perf_counter() + costs.get(count, 2 * before) > deadline:
                break
            found.setdefault(count, []).append(run(count))
            before = costs[count] = count * (INPUT_LEN + OUTPUT_LEN) / found[count][-1]
    return [Row("throughput", "policy", count, median(own), min(own), max(own)) for count, own in found.items()]


# -- memory --------------------------------------------------------------------------------------------------------


def memory(models: Sequence[str], sp: int, console: Console) -> list[Row]:
    """MiB of all ranks with a full cache, each size in a new process."""
    rows = []
    for model in models:
        for blocks in MEMORY_BLOCKS:
            command = [sys.executable, __file__, "--memory-of", model, str(blocks), "--sp", str(sp)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                console.print(f"memory of {model}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
                continue
            found = json.loads(result.stdout.splitlines()[-1])
            for series in ("rss", "pss", "weights", "cache"):
                mebibytes = found[series] / 2**20
                rows.append(Row("memory", f"{model} {series}", blocks * BLOCK_SIZE, mebibytes, mebibytes, mebibytes))
    return rows


def print_memory(model: str, blocks: int, sp: int) -> None:
    """Print the bytes of all ranks of an engine with a full cache, as JSON."""
    with init_inference(
        random_model(model),
        parallel={"sp": sp},
        cache={"num_blocks": blocks, "enable_prefix_caching": False},
        scheduler={"max_num_batched_tokens": 512},
    ) as engine:
        engine.generate([[1] * (BLOCK_SIZE * blocks // 4 - 1)] * 4, SamplingParams(max_tokens=1, temperature=0))
        own = psutil.Process()
        ranks = [own, *(child for child in own.children() if "ulysses_infer.job.processes" in child.cmdline())]
        infos = [process.memory_full_info() for process in ranks]
        stats = engine.stats()
        found = {
            "rss": sum(info.rss for info in infos),
            "pss": sum(info.pss for info in infos),
            "weights": sum(stats["weight_bytes_per_rank"]),
            "cache": stats["cache_bytes_per_rank"] * len(ranks),
        }
        print(json.dumps(found))


# -- output --------------------------------------------------------------------------------------------------------


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Every row, with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(
            row._replace(value=round(row.value, 4), low=round(row.low, 4), high=round(row.high, 4)) for row in rows
        )


PANELS = {
    "tokens": ("Step time over prefilled tokens", "tokens in the step", "ms"),
    "requests": ("Step time over running requests", "requests that decode", "ms"),
    "context": ("Step time over context, 4 requests", "tokens of context each", "ms"),
    "throughput": (f"Throughput, {INPUT_LEN} in / {OUTPUT_LEN} out", "concurrent requests", "tokens/s"),
    "memory": ("Memory of all ranks", "tokens of cache", "MiB"),
}

LINES = {"rss": "-", "pss": "--", "weights": ":", "cache": "-."}


def draw(rows: Sequence[Row], title: str, subtitle: str, path: Path) -> None:
    """Draw all panels in one figure."""
    from matplotlib.figure import Figure

    from ulysses_infer.bench.compare.plots.style import empty, heading, plain_numbers, styled

    with styled():
        figure = Figure(figsize=(12.5, 7.6))
        for place, (sweep, (name, x_label, unit)) in enumerate(PANELS.items()):
            axes = figure.add_subplot(2, 3, place + 1)
            axes.set_title(f"{name}, {unit}", fontsize=10.5)
            axes.set_xlabel(x_label)
            own = [row for row in rows if row.sweep == sweep]
            if not own:
                empty(axes, "no data")
                continue
            _lines(axes, own)
            plain_numbers(axes)
        figure.subplots_adjust(left=0.055, right=0.985, bottom=0.08, wspace=0.24, hspace=0.42)
        heading(figure, title, subtitle, top=1.05)
        figure.savefig(path)


def _lines(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    from ulysses_infer.bench.compare.plots.style import number

    for series in dict.fromkeys(row.series for row in rows):
        own = sorted(row for row in rows if row.series == series)
        x, colour = [row.x for row in own], series_colour(series)
        axes.vlines(x, [row.low for row in own], [row.high for row in own], color=colour, alpha=0.4, linewidth=1.3)
        axes.plot(
            x,
            [row.value for row in own],
            color=colour,
            marker="o",
            markersize=4,
            label=series,
            linestyle=LINES.get(series.split()[-1], "-"),
        )
    ticks = sorted({row.x for row in rows})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks[:: 1 + len(ticks) // 7])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: number(value)))
    num_series = len({row.series for row in rows})
    axes.set_ylim(0, max(row.high for row in rows) * (1.05 if num_series < 3 else 1.45))
    if num_series > 1:
        axes.legend(fontsize=7.5, ncols=1 if num_series < 3 else 2, loc="upper left")


def series_colour(series: str) -> str:
    """The colour of a mode, or of a model's memory."""
    from ulysses_infer.bench.compare.plots.style import COLOURS, mode_colour

    words = series.split()
    if words[0] == "SP":
        return mode_colour(int(words[1]), int(words[4]))
    return COLOURS["adaptive"] if "60m" in series else COLOURS["shift"]


def main() -> None:
    """Measure and write the results."""
    end_children_with_this_process()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        parents=[model_options("llama-60m"), common_options(sp=2)],
    )
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="total time for steps and throughput (default 300)"
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=512, help="maximum number of concurrent requests (default 512)"
    )
    parser.add_argument(
        "--memory-models", default="llama-60m,llama-0.5b", help="models for the memory plot; '' for none"
    )
    parser.add_argument("--output", type=Path, default=Path("growth"), help="folder to write (default: %(default)s)")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "BLOCKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print_memory(options.memory_of[0], int(options.memory_of[1]), options.sp)
        return
    console, others = Console(), LoadMeter()
    path = model_path(options)
    with init_inference(
        path,
        parallel={"sp": options.sp},
        cache={"num_blocks": CACHED_TOKENS // BLOCK_SIZE + options.max_num_seqs, "enable_prefix_caching": False},
        scheduler={"max_num_seqs": options.max_num_seqs, "max_num_batched_tokens": 4096},
    ) as engine:
        rows = engine._on_rank_0(lambda own: step_times(own, options.seconds))
        rows += throughput(engine, min(256, options.max_num_seqs), SHARES["throughput"] * options.seconds)
        busy = others.foreign_cores()
    rows += memory([name for name in options.memory_models.split(",") if name], options.sp, console)
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(rows, options.output / "growth.csv")
    subtitle = f"{Path(path).name} on {options.sp} ranks · medians and ranges · other programs: {busy:.2f} cores"
    draw(rows, "Growth of costs", subtitle, options.output / "growth.png")
    console.print(f"{len(rows)} points; other programs kept {busy:.2f} cores busy; written to {options.output}")


if __name__ == "__main__":
    main()
