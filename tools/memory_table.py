"""Weight memory per rank for each placement of a model's experts, as the loader computes it. Reads no weights.

Run from the repository root: `python -m tools.memory_table configs/models/qwen3-30b-a3b.json --sp 8`. The default are
the two mixture-of-experts models of the Shift Parallelism paper, in their layouts on 8 ranks. A model is a config.json
or its folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.experts.placement import PLACEMENTS
from ulysses_infer.model.loading.config_folder import read_config_file
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode

MODELS = Path("configs/models")
PAPER = ((MODELS / "qwen3-30b-a3b.json", Mode(8, 1)), (MODELS / "llama-4-scout-17b-16e.json", Mode(4, 2)))
GIB = 1 << 30


class Row(NamedTuple):
    """Bytes on the rank that stores most."""

    placement: str
    weights: int
    experts: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="config.json files, or folders that contain one")
    parser.add_argument("--sp", type=int, default=8, help="token slices of the base mode")
    parser.add_argument("--tp", type=int, default=1, help="weight slices of the base mode")
    arguments = parser.parse_args()
    chosen = [(model, Mode(arguments.sp, arguments.tp)) for model in arguments.models]
    print("| model | base | experts | weights per rank | of which experts |\n|---|---|---|---|---|")
    for path, base in chosen or PAPER:
        for row in rows(read_config(path), Layout(base)):
            weights, experts = f"{row.weights / GIB:.2f} GiB", f"{row.experts / GIB:.2f} GiB"
            print(f"| {_name(path)} | {base} | {row.placement} | {weights} | {experts} |", flush=True)


def read_config(path: Path) -> Any:
    """transformers' config of a config.json or of the folder it is in."""
    return read_config_file(path / "config.json" if path.is_dir() else path)


def rows(config: Any, layout: Layout) -> Iterator[Row]:
    """One row per possible placement, for the rank that stores most."""
    for placement in PLACEMENTS:
        try:
            ranks = [draw(config, layout, shard, placement) for shard in range(layout.world_size)]
        except ConfigError as error:
            print(f"{placement} is not possible: {error}")
            continue
        fullest = max(ranks, key=lambda rank: rank.weight_bytes)
        yield Row(placement, fullest.weight_bytes, fullest.expert_bytes)


def draw(config: Any, layout: Layout, shard: int, placement: str) -> ModelBuilder:
    """The engine's plan of what `shard` stores, without allocated memory."""

    def no_weights() -> Any:
        raise AssertionError("the plan must not read weights")

    settings = ModelConfig(path="-")
    return ModelBuilder(config, no_weights, settings, layout, shard, torch.device("cpu"), placement)


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


if __name__ == "__main__":
    main()
