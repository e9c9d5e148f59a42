"""Runs `--dry-run` and prints its table."""

from __future__ import annotations

import argparse
import sys

from ulysses_infer.cli.dry_run.gpus import find_gpu, own_gpu
from ulysses_infer.cli.dry_run.report import dry_run
from ulysses_infer.cli.dry_run.table import render
from ulysses_infer.config import Config


def run(options: argparse.Namespace, config: Config) -> None:
    """Print what a start of `config` would do. Raises `UlyssesError`s of one line."""
    gpu = find_gpu(options.gpu) if options.gpu else own_gpu()
    sys.stdout.write(render(dry_run(config, gpu)))
