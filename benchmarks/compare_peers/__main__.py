"""The engine against its peers on the same checkpoints and processors, in one run.

    python -m benchmarks.compare_peers               # everything; installs and compiles the peers on first use
    python -m benchmarks.compare_peers --models llama-60m --peers ours-tp,vllm,vllm-tp --repeats 3
    python -m benchmarks.compare_peers --quick       # small sizes: ends within 15 minutes once the peers are installed
    python -m benchmarks.compare_peers --check       # first: do all give the same tokens in float32?

Random weights, random token prompts, greedy, end of text ignored. Every engine is one process (or one per thread),
started once and stopped while another is measured; rounds over all of them are repeated. An interrupted run (Ctrl-C,
SIGTERM) ends all processes, and reports and writes the rounds that were measured.

The machine's limit is computed from the best rate of all types of numbers and rounds, and is never worse than what an
engine reached.

A peer that cannot be installed or run here is named with the reason, and the others go on. vLLM needs
libtcmalloc_minimal preloaded: it is taken from the system, or from `vllm/lib` in the folder of environments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.compare_peers.catalogue import CONTENDERS, LIMITS, Setting
from benchmarks.compare_peers.floors import Floors, Sizes, floors
from benchmarks.compare_peers.measuring import Measured, RunningPrograms, Work, first_tokens, run_rounds
from benchmarks.compare_peers.report import as_values, machine, markdown, notes, reached, same_tokens, table
from ulysses_infer.bench.random_model import SHAPES, random_model
from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.engine.profile_key import device_name

WIDTH = 190  # of a table written to a file
QUICK = {"models": "llama-60m", "repeats": 3, "single": "1x128/24", "concurrent": "8x64/16", "seconds": 840.0}
QUICK_HELP = "llama-60m, 1x128/24, 8x64/16, 3 rounds, no round begins after 14 minutes; other options overrule these"
CHECK = Work(num_prompts=1, input_len=64, output_len=8)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser("compare_peers", description=about[0], epilog=about[-1])
    names = ", ".join(CONTENDERS)
    parser.add_argument("--models", default="llama-60m,llama-0.5b", help=f"of {', '.join(SHAPES)} (default: both)")
    parser.add_argument("--peers", default=names.replace(" ", ""), help=f"contenders, of {names} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each engine, all processes together (default 2)")
    parser.add_argument(
        "--single", default="1x512/64", help="the single request: 1 x tokens in / out (default 1x512/64)"
    )
    parser.add_argument("--concurrent", default="32x256/64", help="the concurrent requests (default 32x256/64)")
    parser.add_argument(
        "--environments",
        type=Path,
        default=cache_folder("peers"),
        help="folder for the peers' virtual environments (default: in the cache)",
    )
    parser.add_argument("--output", type=Path, default=Path("peers"), help="folder for results and logs (./peers)")
    parser.add_argument("--timeout", type=float, default=900, help="most seconds of one start or measurement (900)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round begins after these (no limit)")
    parser.add_argument("--check", action="store_true", help="first compare the first tokens in float32")
    parser.add_argument("--quick", action="store_true", help=f"small sizes, few rounds: {QUICK_HELP}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of our own configuration")
    parser.set_defaults(**(QUICK if "--quick" in arguments else {}))
    options = parser.parse_args(arguments)
    options.started, options.stopped = time.monotonic(), False
    for field, known in (("models", SHAPES), ("peers", CONTENDERS)):
        chosen = [name for name in getattr(options, field).split(",") if name]
        for name in chosen:
            if name not in known:
                parser.error(f"--{field}: there is no {name!r}; choose from {', '.join(known)}")
        setattr(options, field, chosen)
    for field in ("single", "concurrent"):
        try:
            setattr(options, field, parse_work(getattr(options, field)))
        except ValueError:
            parser.error(f"--{field}: {getattr(options, field)!r} is not COUNTxTOKENS_IN/TOKENS_OUT, out at least 2")
    for override in options.overrides:
        if "=" not in override:
            parser.error(f"{override!r} is not key=value")
    return options


def parse_work(text: str) -> Work:
    """`32x256/64`: 32 prompts of 256 tokens, 64 out each. Raises `ValueError`."""
    count, _, lengths = text.partition("x")
    given, _, wanted = lengths.partition("/")
    work = Work(int(count), int(given), int(wanted))
    if work.num_prompts < 1 or work.input_len < 1 or work.output_len < 2:
        raise ValueError(text)
    return work


def main() -> None:
    """Measure model after model; print and write after each."""
    end_children_with_this_process()
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the processes and keep what was measured
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < options.threads:
        sys.exit(f"error: --threads {options.threads}: this process may use {len(cores)} cores; give as many or fewer")
    os.sched_setaffinity(0, cores[: options.threads])
    options.output.mkdir(parents=True, exist_ok=True)
    options.environments.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": device_name(_cpu()),
        "threads": options.threads,
        "overrides": options.overrides,
        "models": {},
    }
    sections = [f"`{' '.join(['python -m benchmarks.compare_peers', *sys.argv[1:]])}`\n"]
    for name in options.models:
        measured, limits = compare(name, options, console)
        title = f"{name}, bf16, {options.threads} threads, medians of {options.repeats} (ranges)"
        console.print(f"\n[bold]{title}[/bold]")
        console.print(table(measured, limits))
        for line in notes(measured):
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        results["models"][name] = as_values(measured, limits)
        sections.append(markdown(title, measured, limits))
        (options.output / "peers.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (options.output / "peers.md").write_text("\n".join(sections), encoding="utf-8")
        if options.stopped:
            break
    console.print(f"written to {options.output}/peers.json and peers.md")
    if options.stopped:
        sys.exit(128 + signal.SIGINT)


def compare(name: str, options: argparse.Namespace, console: Console) -> tuple[Measured, Floors | None]:
    """All rounds on one checkpoint, and the machine's limits for it."""

    def say(text: str) -> None:
        console.print(f"{name}: {text}", style="dim", highlight=False, markup=False, soft_wrap=True)

    model = random_model(name)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    contenders = {peer: CONTENDERS[peer] for peer in CONTENDERS if peer in options.peers}
    longest = max(work.input_len + work.output_len for work in (options.single, options.concurrent, CHECK))
    setting = Setting(
        model,
        "bfloat16",
        options.threads,
        longest,
        max(options.single.num_prompts, options.concurrent.num_prompts),
        options.environments.resolve(),
        dict(override.split("=", 1) for override in options.overrides),
    )
    logs = options.output / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    if options.check:
        exact = Setting(**{**vars(setting), "dtype": "float32"})
        found = first_tokens(exact, contenders, logs, options.timeout, CHECK, config["vocab_size"], say)
        console.print(same_tokens(found))
    measured = Measured()
    running = RunningPrograms(setting, logs, options.timeout, measured, say)
    programs = [LIMITS, *(contender.program for contender in contenders.values())]
    with keep_when_stopped(options), running.started(programs):
        run_rounds(
            running,
            contenders,
            measured,
            options.single,
            options.concurrent,
            config["vocab_size"],
            options.repeats,
            say,
            options.started + options.seconds,
        )
    if not measured.limits:
        return measured, None
    limits = floors(Sizes.of(config), options.single, options.concurrent, *machine(measured))
    return measured, reached(measured, limits)


@contextmanager
def keep_when_stopped(options: argparse.Namespace) -> Iterator[None]:
    """Goes on after an interruption inside, which is noted in `options.stopped`."""
    try:
        yield
    except KeyboardInterrupt:
        options.stopped = True


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


if __name__ == "__main__":
    main()
