"""What a draft model gains and costs, as ratios to none in the same run: `python -m benchmarks.compare_draft_model`.

The served model has the shape of llama-0.5b, the draft model a twelfth of its weights. Both are `counting_model`s, so
every draft is right: the most that a draft model of this size can gain. With random weights instead every draft is
wrong: what `num_tokens: auto` loses until it stops. Settings alternate on one engine; a ratio is that of one repeat.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.compare_speculation import NONE, Run, Study, tokens_per_second, tpot
from benchmarks.counting_model import counting_model, random_prompt
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.bench.load import LoadMeter
from ulysses_infer.bench.random_model import random_model
from ulysses_infer.bench.workload import sample_of
from ulysses_infer.config.speculation import AUTO
from ulysses_infer.console.screen import make_console
from ulysses_infer.engine.profile_key import device_name
from ulysses_infer.inference import InferenceEngine

SERVED, DRAFT = "llama-0.5b", "llama-0.5b-draft"
LENGTHS = (AUTO, 2, 4)
LOADS = {"one request": 1, "4 requests": 4}


def start(draft: Path, draft_ranks: str, ranks: int) -> InferenceEngine:
    """An engine whose speculation is changed from run to run."""
    return init_inference(
        str(counting_model(SERVED)),
        parallel={"sp": ranks},
        speculation={"method": "draft_model", "model": str(draft), "draft_ranks": draft_ranks},
        policy={"name": "adaptive", "profile": None, "calibration_seconds": 6},
        scheduler={"max_num_seqs": 8, "max_num_batched_tokens": 512},
        model={"max_model_len": 1024},
        cache={"num_blocks": 512},
    )


def measure(engine: InferenceEngine, setting: str, prompts: list[list[int]], tokens: int) -> Run:
    """Run prompts once. setting: none, auto or a number of tokens."""
    own = engine._engine
    assert own is not None
    assert own.speculation is not None
    length = setting if setting in (NONE, AUTO) else int(setting)
    own.speculation.config = replace(own.speculation.config, num_tokens=AUTO if length == NONE else length)
    own.speculation.reset_stats()
    own.scheduler.allocator.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, speculation=setting != NONE)
    sample = sample_of(engine.generate(prompts, params))
    stats = own.speculation.stats
    return Run(sample, stats.num_draft_tokens, stats.num_accepted_tokens)


def study(
    engine: InferenceEngine,
    found: Study,
    settings: list[str],
    tokens: int,
    repeats: int,
    is_over: Callable[[], bool],
) -> None:
    """Run all loads in all settings, as long as there is time; the first round is not counted."""
    for load, count in LOADS.items():
        for repeat in range(-1, repeats):
            for setting in (*settings[repeat % len(settings) :], *settings[: repeat % len(settings)]):
                if is_over():
                    return
                seed = 1000 * repeat + settings.index(setting) * 100  # a text is new to the draft model
                prompts = [random_prompt(engine.vocab_size, 64, tokens, seed + each) for each in range(count)]
                run = measure(engine, setting, prompts, tokens)
                if repeat >= 0:
                    found.runs.setdefault((load, setting), []).append(run)


def rows_of(found: Study) -> Iterator[tuple[str, ...]]:
    """One row per load and setting."""
    for (load, setting), runs in found.runs.items():
        drafted, accepted = sum(run.num_drafted for run in runs), sum(run.num_accepted for run in runs)
        time_ratio = found.ratio(load, setting, tpot)
        speed_ratio = found.ratio(load, setting, tokens_per_second)
        shown = (f"{ratio:.2f}x" if ratio is not None else "-" for ratio in (time_ratio, speed_ratio))
        yield load, setting, *shown, f"{accepted} of {drafted}" if drafted else "-"


def main() -> None:
    """Measure drafts that are right on all ranks and on the first, then drafts that are wrong; print each when done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default 2)")
    parser.add_argument("--repeats", type=int, default=2, help="repetitions of each measurement (default 2)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each output (default 48)")
    parser.add_argument("--minutes", type=float, default=3.7, help="no run starts after this time (default 3.7)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console, load, started = make_console(0), LoadMeter(), time.monotonic()
    console.print(f"{options.ranks} ranks, {device_name(torch.device('cpu'))}\n")
    right, all_lengths = counting_model(DRAFT), [NONE, *map(str, LENGTHS)]
    cases = (
        ("right drafts, draft_ranks all", right, "all", all_lengths),
        ("right drafts, draft_ranks first", right, "first", all_lengths),
        ("wrong drafts", random_model(DRAFT), "all", [NONE, AUTO]),
    )
    with suppress(KeyboardInterrupt):
        for number, case in enumerate(cases, start=1):
            end = started + 60 * options.minutes * number / len(cases)
            _compare(*case, options, console, partial(_has_passed, end))
    console.print(f"{time.monotonic() - started:.0f} s; other programs kept {load.foreign_cores():.2f} cores busy")


def _has_passed(moment: float) -> bool:
    return time.monotonic() > moment


def _compare(
    name: str,
    draft: Path,
    draft_ranks: str,
    settings: list[str],
    options: argparse.Namespace,
    console: Console,
    is_over: Callable[[], bool],
) -> None:
    """Run one case and print what is finished of it, even if it is stopped."""
    found = Study(name)
    try:
        with start(draft, draft_ranks, options.ranks) as engine:
            study(engine, found, settings, options.tokens, options.repeats, is_over)
    finally:
        table = Table(title=name, box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
        for column in ("load", "num_tokens", "TPOT", "tokens/s", "accepted of drafted"):
            table.add_column(column, justify="left" if column == "load" else "right")
        for row in rows_of(found):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
