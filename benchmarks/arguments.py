"""Command-line options that several benchmarks share, as argparse parents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ulysses_infer.bench.random_model import SHAPES, random_model

COMMON: dict[str, tuple[type, str]] = {
    "sp": (int, "sequence parallel size"),
    "tp": (int, "tensor parallel size"),
    "ranks": (int, "number of ranks to start"),
    "threads": (int, "CPU threads"),
    "repeats": (int, "repetitions of each measurement"),
    "steps": (int, "steps to measure"),
    "seconds": (float, "measuring time of each case, in seconds"),
    "context": (int, "context length of each request, in tokens"),
    "input-len": (int, "tokens of each prompt"),
    "output-len": (int, "tokens to generate per request"),
    "attention-backend": (str, "runtime.attention_backend of the recipe"),
    "output": (Path, "JSON file to write the results to"),
}
"""The type and the help text of each shared option."""


def common_options(**defaults: Any) -> argparse.ArgumentParser:
    """Returns a parent parser with the options of `COMMON` named in `defaults`."""
    parser = argparse.ArgumentParser(add_help=False)
    for name, default in defaults.items():
        option = name.replace("_", "-")
        kind, text = COMMON[option]
        shown = text if default is None else f"{text} (default: %(default)s)"
        parser.add_argument(f"--{option}", type=kind, default=default, help=shown)
    return parser


def model_options(default: str | None = None) -> argparse.ArgumentParser:
    """Returns a parent parser with --model and --random-model; without a default shape, exactly one must be given."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser if default else parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model", help="path of a checkpoint")
    group.add_argument("--random-model", choices=SHAPES, default=default, help="use random weights of this shape")
    return parser


def model_path(options: argparse.Namespace) -> str:
    """The checkpoint that the options of `model_options` select; one with random weights is created if necessary."""
    return options.model or str(random_model(options.random_model))


def launcher_options() -> argparse.ArgumentParser:
    """Returns a parent parser that accepts the --local_rank that the DeepSpeed launcher adds."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser
