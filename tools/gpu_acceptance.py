"""Everything that only GPUs can show, in one run: `python -m tools.gpu_acceptance`, on a machine with 1, 2 or 8 GPUs.

Kernels against the torch loop, CUDA graphs against eager steps, every mode against the others, NCCL and the other
collectives, decode and prefill against the device's own rates, the time of a start, and other programs. Prints one
table and writes configs/profiles/GPU-COUNT.json. Exit status 1 if a check fails.

`--device cpu --quick` runs the same code without a GPU, on small shapes; targets of speed then do not apply.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import torch

from tools.acceptance.check import FAILED, Group, Result, Settings, as_dicts, run_group, table

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    "kernels": "tools.acceptance.kernels:check_kernels",
    "operations": "tools.acceptance.operations:check_operations",
    "collectives": "tools.acceptance.exchanges:check_exchanges",
    "engines": "tools.acceptance.engines:check_engines",
    "start": "tools.acceptance.engines:check_start",
    "speed": "tools.acceptance.speed:check_speed",
    "peers": "tools.acceptance.peers:check_peers",
}
"""Module and function of each group of checks; imported late, because the ranks of a job import this file too."""
NEEDS_SIZE = ("start", "peers")
"""Groups that need a model whose layers take time; the others use the bundled one."""


def main() -> None:
    """Run the checks; exits with 1 if one fails."""
    options = parse()
    device = torch.device(options.device)
    ranks = options.ranks or default_ranks(torch.cuda.device_count())
    results = []
    for name in options.only or GROUPS:
        model = model_of(name, options)
        for result in run_group(name, group_of(name), Settings(device, ranks, options.quick, model)):
            print(f"{result.outcome:8} {result.check}", file=sys.stderr, flush=True)
            results.append(result)
        gc.collect()
        torch.cuda.empty_cache()  # for the processes of the next group
    sys.stdout.write(table(results))
    path = options.output or (default_output(device, ranks) if device.type == "cuda" else None)
    if path is not None:
        save(path, device, ranks, options.quick, results)
        print(f"written: {path}")
    sys.exit(1 if any(result.outcome == FAILED for result in results) else 0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="GPUs to use; default: all, up to 8. On a CPU, processes (default 1)")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run, not how fast")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"some of: {', '.join(GROUPS)}")
    parser.add_argument("--model", type=Path, help="checkpoint for start and peers; default: 0.5 B random parameters")
    parser.add_argument("--output", type=Path, help="JSON file; default: configs/profiles/GPU-COUNT.json, on GPUs only")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --quick runs the same code without one")
    if options.device == "cuda" and (options.ranks or 0) > torch.cuda.device_count():
        parser.error(f"--ranks {options.ranks}: this machine has {torch.cuda.device_count()} GPUs")
    return options


def default_ranks(num_gpus: int) -> int:
    """The largest power of two up to 8, which divides the heads of the bundled model."""
    return max(count for count in (1, 2, 4, 8) if count <= max(1, num_gpus))


def group_of(name: str) -> Group:
    """The function of a group of checks."""
    module, function = GROUPS[name].split(":")
    group: Group = getattr(importlib.import_module(module), function)
    return group


def model_of(group: str, options: argparse.Namespace) -> Path:
    """The checkpoint of a group of checks."""
    if group in NEEDS_SIZE and options.model is not None:
        return Path(options.model)
    if group in NEEDS_SIZE and not options.quick:
        from ulysses_infer.bench.random_model import random_model

        return random_model("llama-0.5b")
    return ROOT / "models" / "demo"


def default_output(device: torch.device, ranks: int) -> Path:
    """The profile of this kind and number of GPUs."""
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ").lower().replace(" ", "-")
    return ROOT / "configs" / "profiles" / f"{name}-{ranks}.json"


def save(path: Path, device: torch.device, ranks: int, quick: bool, results: list[Result]) -> None:
    """Write all results as JSON, with what they were measured on."""
    values = {
        "how": "tools/gpu_acceptance.py" + " --quick" * quick,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": ranks,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "checks": as_dicts(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
