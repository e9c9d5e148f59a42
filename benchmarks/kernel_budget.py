"""Launches per layer of a decode step on a GPU, without a GPU: `python -m benchmarks.kernel_budget [RECIPE ...]`.

Runs decode steps of the recipes' models, of true widths and few layers, on device `meta` and counts the kernels from
one layer's attention to the next. Exchanges between ranks are counted apart. "Unfused" is transformers' own layer loop
with our attention: `runtime.fuse=false`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recipe_models import recipe_path, write_config
from ulysses_infer.cli.dry_run.gpus import find_gpu
from ulysses_infer.cli.dry_run.report import dry_run
from ulysses_infer.config import load_config
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.graphs.launch_counter import StepLaunches

RECIPES = (
    "llama-3.3-70b-fp8-8xh200",
    "qwen3-32b-fp8-8xh200",
    "qwen3-8b-2x24gb",
    "qwen3-30b-a3b-8xh200",
    "llama-4-scout-17b-16e-8xh200",
)
LAYERS = 4
"""Scout's layers differ in fours."""


@dataclass(frozen=True)
class Budget:
    """The launches of one layer of a model in one mode."""

    recipe: str
    mode: Mode
    unfused: float
    launches: float
    exchanges: float
    kernels: Counter[str]


def budgets(recipe: str, gpu: str = "h200") -> Iterator[Budget]:
    """The launches of the largest captured decode step of each mode of `recipe`."""
    fused, unfused = largest_decodes(recipe, gpu), largest_decodes(recipe, gpu, "runtime.fuse=false")
    for mode, step in fused.items():
        yield Budget(
            recipe,
            mode,
            unfused[mode].kernels_per_layer,
            step.kernels_per_layer,
            step.exchanges_per_layer,
            step.of_a_layer,
        )


def largest_decodes(recipe: str, gpu: str, *overrides: str) -> dict[Mode, StepLaunches]:
    """The decode step with the most rows of each mode. Raises RuntimeError if one does not run on device `meta`."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(recipe, Path(folder), LAYERS)
        found = dry_run(load_config(recipe_path(recipe), [f"model.path={model}", *overrides]), find_gpu(gpu))
    steps = {}
    for mode, decodes in found.decodes.items():
        if isinstance(decodes, str):
            raise RuntimeError(f"{recipe}, {mode}: {decodes}")
        steps[mode] = decodes[max(decodes)]
    return steps


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", default=RECIPES, help="names of files in recipes/")
    parser.add_argument("--gpu", default="h200", help="the GPU to assume (default: %(default)s)")
    options = parser.parse_args()
    print("| recipe | mode | unfused | launches | exchanges | kernels |\n|---|---|---|---|---|---|")
    for recipe in options.recipes:
        for each in budgets(recipe, options.gpu):
            kernels = ", ".join(f"{count} {name}" for name, count in each.kernels.items())
            row = (recipe, each.mode, f"{each.unfused:.0f}", f"{each.launches:.0f}", f"{each.exchanges:.0f}", kernels)
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
