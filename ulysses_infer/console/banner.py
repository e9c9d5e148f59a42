"""Output before the first token: the configuration, and the progress of loading."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ulysses_infer.config import Config
from ulysses_infer.config.settings import settings_of_config
from ulysses_infer.console.screen import mode_text, one_line
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.model.loading.checkpoint import Progress as ReportProgress
from ulysses_infer.version import __version__

MIB = 1 << 20
VALUE_WIDTH = 60


def print_config(console: Console, title: str, config: Config) -> None:
    """The resolved configuration, one line per section; keys with default values are left out."""
    world_size = config.parallel.world_size
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    if config.parallel.dp > 1:
        ranks = f"{config.parallel.dp} replicas of {ranks}"
    modes = Text("  ").join(mode_text(mode) for mode in config.parallel.available_modes)
    heading = Text.assemble(("ulysses-infer", "bold"), f" {__version__} · {title} · {ranks}")
    if world_size > 1:
        heading = Text.assemble(heading, f" · {config.policy.name}  ", modes)
    console.print(heading)
    grid = Table.grid(padding=(0, 2, 0, 0))
    for section, settings in _sections(config).items():
        grid.add_row(Text(f"  {section}", style="dim"), Text("  ".join(settings)))
    console.print(grid)


def _sections(config: Config) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for setting in settings_of_config(config):
        section, _, name = setting.key.partition(".")
        secret = section == "server" and name.endswith("api_key")
        sections.setdefault(section, []).append(f"{name}={'(hidden)' if secret else _short(name, setting.value)}")
    return sections


def _short(name: str, value: Any) -> str:
    if name == "prompts":
        return str(len(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    if name == "path":
        return shown_path(value)
    return one_line(str(value), VALUE_WIDTH)


def shown_path(path: str) -> str:
    """`path` relative to the working directory if it is below it."""
    below = os.path.isabs(path) and Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if below else path


@contextmanager
def loading_bar(console: Console) -> Iterator[ReportProgress]:
    """A progress bar for the checkpoint's tensors, on a terminal; yields the callback."""
    bar = Progress(
        TextColumn("loading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def loaded(config: Config, console: Console) -> Iterator[InferenceEngine]:
    """The engine, started with a progress bar on rank 0 and shut down at the end. Collective."""
    started = time.monotonic()
    with loading_bar(console) as progress:
        engine = InferenceEngine(config, progress=progress)
    with engine:
        stats = engine.stats()
        console.print(_what_was_loaded(stats, time.monotonic() - started))
        console.print()
        yield engine


def _what_was_loaded(stats: dict[str, Any], seconds: float) -> Text:
    weights = max(stats["weight_bytes_per_rank"]) / MIB
    cache = stats["cache_bytes_per_rank"] / MIB
    return Text(
        f"  loaded in {seconds:.1f} s: {weights:.1f} MiB of weights and {cache:.1f} MiB of cache a rank "
        f"({stats['num_blocks']} blocks)",
        style="dim",
    )
