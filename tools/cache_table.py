"""Memory of the cache per rank for models whose layers cache less than full attention would. Reads no weights.

Run from the repository root: `python -m tools.cache_table configs/models/gemma-4-31b.json --sp 8 --gpu h200`. The
numbers are those of a start on GPUs (the budget of `--dry-run`): what a request holds while it decodes, and how many
such requests fit. "Full attention" is the same model if every layer cached keys and values of all tokens, as many as
the layer that has most of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.memory_table import MODELS, read_config
from ulysses_infer.cache.budget import assumed_memory
from ulysses_infer.cache.groups import CacheGroups
from ulysses_infer.cache.paged import CacheShape
from ulysses_infer.cache.sizing import CacheSizing
from ulysses_infer.cache.states import slot_bytes
from ulysses_infer.cli.dry_run.config_only import read_config_only
from ulysses_infer.cli.dry_run.gpus import Gpu, find_gpu
from ulysses_infer.cli.dry_run.meta_rank import MetaRank
from ulysses_infer.config import choose_for_device, load_config
from ulysses_infer.kernels.launch import assume
from ulysses_infer.model.injection.heads import expanded_heads

LENGTHS = (8192, 32768, 131072, 262144)
GIB, KIB = 1 << 30, 1 << 10


class Row(NamedTuple):
    """Bytes on a rank for one request of `length` tokens, and how many such requests its memory holds."""

    length: int
    request: int
    full: int
    requests: int
    full_requests: int


class CacheTable(NamedTuple):
    """Bytes on the rank that stores most."""

    weights: int
    cache: int
    per_token: int
    """Of a token that all layers keep, windows included."""
    per_long_token: int
    """Of a token that only layers without windows keep."""
    full_per_token: int
    states: int
    """Of a request's recurrent states."""
    rows: list[Row]


def main() -> None:
    """Print the table of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="config.json files, or folders that contain one")
    parser.add_argument("--sp", type=int, default=8, help="token slices of the base mode")
    parser.add_argument("--tp", type=int, default=1, help="weight slices of the base mode")
    parser.add_argument("--gpu", default="h200", help="the GPU of each rank")
    arguments = parser.parse_args()
    for path in arguments.models or [MODELS / "gemma-4-31b.json"]:
        print("\n".join(render(path.stem, measure(path, arguments.sp, arguments.tp, find_gpu(arguments.gpu)))))


def measure(path: Path, sp: int, tp: int, gpu: Gpu) -> CacheTable:
    """The table of a config.json in the layout (sp, tp)."""
    with tempfile.TemporaryDirectory() as folder:
        read_config(path).save_pretrained(folder)
        rank = _start(folder, sp, tp, gpu)
    shape, groups = rank.worker.cache.shape, rank.worker.cache.groups
    full, states = full_attention(rank), slot_bytes(rank.model.state_shapes)
    decode = CacheSizing(shape, groups, max(LENGTHS), 1, 1)
    decode_full = CacheSizing(full, CacheGroups.single(full.num_layers), max(LENGTHS), 1, 1)
    limited = [span.is_limited for span in groups.attention_spans]
    endless = [layer for layer, group in enumerate(groups.of_layer) if group is not None and not limited[group]]
    return CacheTable(
        weights=rank.budget.weights,
        cache=rank.budget.left,
        per_token=shape.bytes_per_block // shape.block_size,
        per_long_token=sum(map(shape.bytes_of_layer, endless)) // shape.block_size,
        full_per_token=full.bytes_per_block // full.block_size,
        states=states,
        rows=list(_rows(decode, decode_full, states, rank.budget.left)),
    )


def _start(folder: str, sp: int, tp: int, gpu: Gpu) -> MetaRank:
    """The rank that stores most, as a dry run starts it."""
    config = load_config(
        None, {"model.path": folder, "parallel.sp": sp, "parallel.tp": tp, "runtime.enforce_eager": True}
    )
    choose_for_device(config, "cuda")
    memory = assumed_memory(gpu.memory, config.cache.memory_utilization)
    with assume("meta", gpu.capability):
        return MetaRank(config, read_config_only(config.model), memory)


def full_attention(rank: MetaRank) -> CacheShape:
    """The cache if every layer had full attention over heads."""
    injection, shape = rank.model.injection, rank.worker.cache.shape
    heads = [expanded_heads(module, injection.config) for module in injection.attention_layers]
    each = max(
        ((each.cached_by(rank.groups.shard, injection.layout), each.key_width, each.value_width) for each in heads),
        key=lambda sizes: sizes[0] * (sizes[1] + sizes[2]),
    )
    return CacheShape.uniform(shape.num_layers, *each, shape.block_size, shape.dtype)


def _rows(sizing: CacheSizing, full: CacheSizing, states: int, left: int) -> Iterator[Row]:
    for length in LENGTHS:
        request = sizing.num_bytes(sizing.blocks_of_request(length)) + states
        whole = full.num_bytes(full.blocks_of_request(length))
        yield Row(length, request, whole, left // request, left // whole)


def render(name: str, table: CacheTable) -> Iterator[str]:
    """The table in Markdown."""
    yield f"{name}, per rank: {table.weights / GIB:.2f} GiB of weights, {table.cache / GIB:.2f} GiB for the cache\n"
    yield "| per token | KiB |\n|---|---|"
    yield f"| in layers that keep all tokens | {table.per_long_token / KIB:.1f} |"
    yield f"| in all layers, within their windows | {table.per_token / KIB:.1f} |"
    yield f"| with full attention | {table.full_per_token / KIB:.1f} |"
    yield f"| per request, for recurrent states | {table.states / KIB:.1f} |\n"
    yield "| tokens of a request | its cache | with full attention | requests that fit | with full attention |"
    yield "|---|---|---|---|---|"
    for row in table.rows:
        sizes = f"{row.request / GIB:.3f} GiB | {row.full / GIB:.3f} GiB"
        yield f"| {row.length:,} | {sizes} | {row.requests:,} | {row.full_requests:,} |"
    yield ""


if __name__ == "__main__":
    main()
