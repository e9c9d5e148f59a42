"""Collectives between the ranks: their results, and how long a small all-reduce takes."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from tools.acceptance.check import Result, Settings, at_most, measured, skipped
from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.errors import UlyssesError, first_line
from ulysses_infer.job.processes import free_port
from ulysses_infer.parallel.groups import ProcessGroups, build_groups, init_distributed
from ulysses_infer.parallel.layout import Layout, Mode, token_spans

HEADS, WIDTH = 2, 16  # of one rank
SIZES = {"4 KiB": 4 << 10, "256 KiB": 256 << 10, "8 MiB": 8 << 20}
LATENCY_BYTES = 16 << 10
REPEATS = 200
SUM_TOLERANCE = 1e-2  # bfloat16, relative to the largest sum
CHOICES = {"cuda": ("auto", "torch"), "cpu": ("shared_memory", "torch")}
"""Values of runtime.collectives: the fastest kind and the one that is always there."""


def check_exchanges(settings: Settings) -> Iterator[Result]:
    """Both kinds of collectives, by the ranks of a job of their own."""
    if settings.ranks == 1:
        yield skipped("collectives", "needs 2 GPUs")
        return
    for choice, found in in_ranks(settings, CHOICES[settings.device.type]).items():
        if "unavailable" in found:
            yield skipped(f"collectives {choice}", found["unavailable"])
            continue
        kind = f"collectives {choice} ({found['kind']})"
        for name, worst in found["differences"].items():
            yield at_most(f"{kind}, {name}: difference", worst, 0.0 if name.startswith("all-to-all") else SUM_TOLERANCE)
        yield measured(f"{kind}, all-reduce of 16 KiB", found["microseconds"], "us")


def in_ranks(settings: Settings, choices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What rank 0 of a job finds out about each kind of collectives."""
    end_children_with_this_process()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        arguments = (settings.ranks, free_port(), settings.device.type, choices, str(path))
        torch.multiprocessing.spawn(rank_main, arguments, nprocs=settings.ranks)
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def rank_main(rank: int, ranks: int, port: int, device_type: str, choices: Sequence[str], path: str) -> None:
    """One rank: join, compare, and on rank 0 write what was found."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    init_distributed(device)
    found = {choice: examine_choice(ranks, device, choice) for choice in choices}
    if rank == 0:
        Path(path).write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def examine_choice(ranks: int, device: torch.device, choice: str) -> dict[str, Any]:
    """What is found out about `runtime.collectives` = `choice`, or why it is not available here. Collective."""
    layout = Layout(Mode(ranks, 1))
    try:
        groups = build_groups(layout, [layout.base, layout.shift], device, collectives=choice)
    except UlyssesError as error:
        return {"unavailable": first_line(error)}
    found = examine(groups, device)
    groups.close()
    return found


def examine(groups: ProcessGroups, device: torch.device) -> dict[str, Any]:
    """The largest differences from what each rank can compute alone, and the latency. Collective."""
    group = groups.by_mode[groups.layout.shift].tp_group
    differences = {f"all-reduce of {name}": sum_difference(groups, device, size) for name, size in SIZES.items()}
    differences |= {f"all-to-all of {n} tokens": exchange_difference(groups, device, n) for n in (1, 5, 64, 1000)}
    return {
        "kind": type(group).__name__,
        "differences": {name: _worst(groups, value, device) for name, value in differences.items()},
        "microseconds": latency(groups, device) * 1e6,
    }


def _worst(groups: ProcessGroups, value: float, device: torch.device) -> float:
    gathered = groups.gather_to_first(torch.tensor([value], dtype=torch.float32, device=device))
    return value if gathered is None else float(gathered.max())


def sum_difference(groups: ProcessGroups, device: torch.device, size: int) -> float:
    """All-reduce of a bfloat16 tensor of `size` bytes, relative to the largest element."""
    parts = [_random(rank, size // 2, device) for rank in range(groups.layout.world_size)]
    expected = torch.stack([part.float() for part in parts]).sum(dim=0)
    found = groups.by_mode[groups.layout.shift].sum_over_tp(parts[groups.rank].clone())
    return float((found.float() - expected).abs().max() / expected.abs().max())


def exchange_difference(groups: ProcessGroups, device: torch.device, num_tokens: int) -> float:
    """Both all-to-alls of a step of `num_tokens` tokens, against the slices of the whole tensor."""
    world_size, rank = groups.layout.world_size, groups.rank
    spans = token_spans(num_tokens, world_size)
    whole = _random(7, num_tokens * world_size * HEADS * WIDTH, device).view(num_tokens, world_size * HEADS, WIDTH)
    own, heads = spans[rank], slice(rank * HEADS, (rank + 1) * HEADS)
    sequence = groups.by_mode[groups.layout.base]
    query, key = sequence.tokens_to_heads((whole[own.start : own.stop], whole[own.start : own.stop] * 2), spans)
    back = sequence.heads_to_tokens(query.flatten(1).contiguous(), spans)
    pairs = (
        (query, whole[:, heads]),
        (key, whole[:, heads] * 2),
        (back, whole[own.start : own.stop].flatten(1)),
    )
    return max(float((a.float() - b.float()).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def latency(groups: ProcessGroups, device: torch.device) -> float:
    """Median seconds of an all-reduce of 16 KiB, one after another."""
    partial, sums = torch.zeros(LATENCY_BYTES // 2, dtype=torch.bfloat16, device=device), []
    collectives = groups.by_mode[groups.layout.shift]
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        for _ in range(REPEATS // 5):
            collectives.sum_over_tp(partial)
        _wait(device)
        sums.append((time.perf_counter() - started) / (REPEATS // 5))
    return statistics.median(sums)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random(seed: int, count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator).to(device, torch.bfloat16)
