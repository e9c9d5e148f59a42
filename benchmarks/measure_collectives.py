"""Duration of the exchanges of a step between the ranks of this host, with torch (gloo) and in shared memory.

    python -m benchmarks.measure_collectives [--ranks 2] [--seconds 0.3]
    deepspeed --num_gpus 2 benchmarks/measure_collectives.py

Both alternate for each message size, so that disturbances affect both. Times are microseconds on rank 0, Python
included: minimum and median. Message sizes are the bytes that a rank sends. The time of a copy of the same size is
shown for comparison.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import common_options, launcher_options
from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.job.lifetime import end_with_launcher
from ulysses_infer.job.processes import free_port, is_launched
from ulysses_infer.parallel.groups import ProcessGroups, build_groups, init_distributed
from ulysses_infer.parallel.layout import Layout, Mode, token_spans

SIZES = (1 << 10, 16 << 10, 64 << 10, 256 << 10, 1536 << 10, 8 << 20)
BACKENDS = ("torch", "shared_memory")
HEADS, HEAD_WIDTH = 8, 64  # of one rank
WARM_UPS, MOST, LEAST = 3, 2000, 8
Exchange = Callable[[], Any]


def exchanges(groups: ProcessGroups, size: int) -> dict[str, Exchange]:
    """The measured exchanges by name, with bfloat16 messages of `size` bytes."""
    layout = groups.layout
    sequence, tensor = groups.by_mode[layout.base], groups.by_mode[layout.shift]
    row = layout.world_size * HEADS * HEAD_WIDTH
    tokens = max(1, size // 2 // row)
    spans = token_spans(tokens * layout.world_size, layout.world_size)
    queries = torch.randn(tokens, layout.world_size * HEADS, HEAD_WIDTH, dtype=torch.bfloat16)
    output = torch.randn(tokens * layout.world_size, HEADS * HEAD_WIDTH, dtype=torch.bfloat16)
    partial = torch.zeros(size // 2, dtype=torch.bfloat16)
    message, copy = bytes(size), torch.empty_like(partial)

    def broadcast() -> None:
        assert groups.mailbox is not None
        if groups.is_first:
            groups.mailbox.send(message)
        else:
            groups.mailbox.receive()
        tensor.sum_over_tp(partial[:8])  # makes rank 0 wait until the others have received

    return {
        "all_reduce": lambda: tensor.sum_over_tp(partial),
        "all_to_all to heads": lambda: sequence.tokens_to_heads([queries], spans),
        "all_to_all back": lambda: sequence.heads_to_tokens(output, spans),
        "gather to rank 0": lambda: groups.gather_to_first(partial),
        "broadcast, then a sum": broadcast,
        "(a copy)": lambda: copy.copy_(partial),
    }


def time_all(groups: dict[str, ProcessGroups], size: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Microseconds of each call, by exchange and backend. Collective."""
    both = {backend: exchanges(groups[backend], size) for backend in groups}
    taken: dict[str, dict[str, list[float]]] = {}
    for name in both[BACKENDS[0]]:
        taken[name] = {backend: [] for backend in groups}
        started = time.perf_counter()
        rounds = 0
        while rounds < LEAST or (rounds < MOST and _go_on(groups["torch"], time.perf_counter() - started < seconds)):
            rounds += 1
            for backend, exchange in both.items():
                taken[name][backend] += _time(exchange[name])
    return taken


def _time(exchange: Exchange) -> list[float]:
    taken = []
    for turn in range(WARM_UPS + 5):
        started = time.perf_counter()
        exchange()
        if turn >= WARM_UPS:
            taken.append((time.perf_counter() - started) * 1e6)
    return taken


def _go_on(groups: ProcessGroups, wanted: bool) -> bool:
    """Rank 0's decision, on all ranks."""
    decision = torch.tensor([int(wanted)])
    torch.distributed.broadcast(decision, src=0, group=groups.control)
    return bool(decision)


def report(size: int, taken: dict[str, dict[str, list[float]]], table: Table) -> None:
    """Add the rows of one size."""
    for name, by_backend in taken.items():
        medians = {backend: statistics.median(times) for backend, times in by_backend.items()}
        cells = [f"{number:.1f}" for backend in BACKENDS for number in (min(by_backend[backend]), medians[backend])]
        table.add_row(f"{size >> 10} KB", name, *cells, f"{medians['torch'] / medians['shared_memory']:.1f}")
    table.add_section()


def measure(seconds: float, sizes: list[int]) -> None:
    """Measure on one rank; rank 0 prints the table."""
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    layout = Layout(Mode(int(os.environ["WORLD_SIZE"]), 1))
    modes = [layout.base, layout.shift]
    groups = {name: build_groups(layout, modes, torch.device("cpu"), collectives=name) for name in BACKENDS}
    title = f"{layout.world_size} ranks, {len(os.sched_getaffinity(0))} cores, us"
    table = Table("message", "exchange", "gloo min", "median", "shared min", "median", "ratio", title=title)
    for size in sizes:
        report(size, time_all(groups, size, seconds), table)
    if groups["torch"].is_first:
        Console(width=110).print(table)
    for each in groups.values():
        each.close()
    torch.distributed.destroy_process_group()


def start_ranks(count: int) -> int:
    """Run this program once per rank; returns the first non-zero exit status, or 0."""
    end_children_with_this_process()
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **common}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    return next(filter(None, [rank.wait() for rank in ranks]), 0)


def main() -> None:
    """Start the ranks, or run one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] if __doc__ else None,
        parents=[common_options(ranks=2, seconds=0.3), launcher_options()],
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    arguments = parser.parse_args()
    if not is_launched():
        sys.exit(start_ranks(arguments.ranks))
    end_with_launcher()
    measure(arguments.seconds, list(arguments.sizes))


if __name__ == "__main__":
    main()
