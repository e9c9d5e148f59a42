"""The `calibrate` command: measures the step times of every mode, prints and stores them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulysses_infer.config import Config, PolicyConfig
from ulysses_infer.console.banner import loaded, print_config
from ulysses_infer.console.screen import make_console, mode_name, mode_style
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.crossover import Stretch, fastest_by_tokens
from ulysses_infer.step_time.model import StepTimeModel
from ulysses_infer.step_time.profile import Profile, cached_path
from ulysses_infer.step_time.step_shape import StepShape

LONG_CONTEXT = 4096


def run(options: argparse.Namespace, config: Config, rank: int) -> None:
    """Measure on all ranks; rank 0 prints and stores the profile. Collective. Raises `UlyssesError`s of one line."""
    console = make_console(rank)
    check_output(options.output)
    config = dataclasses.replace(config, policy=PolicyConfig(name="static"))
    print_config(console, "calibrate", config)
    with loaded(config, console) as engine:
        console.print(f"  measuring every mode for at most {options.seconds:g} s\n")
        profile = engine.calibrate(options.seconds)
        longest = engine.max_model_len
    if rank > 0:
        return
    path = Path(options.output) if options.output is not None else cached_path(profile.key)
    profile.save(path)
    model = StepTimeModel(config.parallel.available_modes)
    model.learn(profile.measurements)
    console.print(measured_table(model, profile))
    console.print()
    for line in crossovers(model, config, longest):
        console.print(line)
    _say_where(console, profile, path, options.output is None)


def check_output(output: str | None) -> None:
    """Raise `ConfigError` before anything runs if the profile could not be written afterwards."""
    if output is not None and not Path(output).parent.is_dir():
        raise ConfigError(f"--output {output!r}: folder '{Path(output).parent}' does not exist; create it")


def measured_table(model: StepTimeModel, profile: Profile) -> Table:
    """One row per measured step: its time in every mode, and the model's prediction."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
    table.add_column("step", no_wrap=True)
    for mode in model.modes:
        table.add_column(f"{mode_name(mode)} ms", justify="right", no_wrap=True)
        table.add_column("model", justify="right", no_wrap=True, style="dim")
    table.add_column("fastest", no_wrap=True)
    times: dict[StepShape, dict[Mode, float]] = {}
    for mode, shape, seconds in profile.measurements:
        times.setdefault(shape, {})[mode] = seconds
    for shape, measured in sorted(times.items(), key=lambda item: (item[0].num_tokens, item[0])):
        if len(measured) == len(model.modes):
            table.add_row(_describe(shape), *_cells(model, shape, measured))
    return table


def _cells(model: StepTimeModel, shape: StepShape, measured: dict[Mode, float]) -> list[Text]:
    best = min(measured, key=measured.__getitem__)
    cells = []
    for mode, predicted in zip(model.modes, model.predict(shape), strict=True):
        cells.append(Text(f"{measured[mode] * 1e3:.2f}", style="bold green" if mode == best else ""))
        cells.append(Text(f"{predicted * 1e3:.2f}"))
    return [*cells, Text(mode_name(best), style=mode_style(best))]


def _describe(shape: StepShape) -> str:
    parts = []
    if shape.num_decodes:
        parts.append(f"{shape.num_decodes} x decode at {shape.decode_context // shape.num_decodes}")
    if shape.num_prefills:
        past = (shape.prefill_context - shape.num_prefill_tokens) // shape.num_prefills
        tokens = shape.num_prefill_tokens // shape.num_prefills
        parts.append(f"{shape.num_prefills} x {tokens} prompt tokens" + (f" after {past}" if past else ""))
    return " + ".join(parts)


def crossovers(model: StepTimeModel, config: Config, longest: int) -> list[Text]:
    """The fastest mode by number of tokens, for decodes and prompts with short and long contexts."""
    scheduler, long = config.scheduler, min(LONG_CONTEXT, longest // 2)
    kinds = [(f"decodes at {context}", context, 0, scheduler.max_num_seqs) for context in (256, long)]
    kinds += [(f"prompt after {start}", 0, start, scheduler.max_num_batched_tokens) for start in (0, long)]
    lines = []
    for name, context, start, most in kinds:
        most = min(most, longest) if not context else most

        def step_of(tokens: int, context: int = context, start: int = start) -> StepShape:
            return StepShape.of([context] * tokens, []) if context else StepShape.of([], [(start, tokens)])

        lines.append(Text.assemble(f"  {name:<20}", *_stretches(fastest_by_tokens(model, step_of, most))))
    return lines


def _stretches(stretches: list[Stretch]) -> list[tuple[str, str]]:
    parts = [(f"{mode_name(stretches[0].mode)}", mode_style(stretches[0].mode))]
    for tokens, mode in stretches[1:]:
        parts += [(f"   from {tokens} tokens ", "dim"), (mode_name(mode), mode_style(mode))]
    return parts


def _say_where(console: Console, profile: Profile, path: Path, is_cached: bool) -> None:
    notes = profile.notes
    how = "used from now on with policy.name=adaptive" if is_cached else f"use it with policy.profile={path}"
    console.print(
        f"\n  {notes['steps']} steps in {notes['seconds']:g} s; a change of mode costs "
        f"{profile.switch_seconds * 1e3:.2f} ms\n  written: {path}\n  {how}",
        style="dim",
        markup=False,
    )
    if notes["unmeasured"]:
        console.print(incomplete(notes["unmeasured"], notes["designed"], notes["longest_unmeasured"]), markup=False)


def incomplete(unmeasured: int, designed: int, longest: int) -> str:
    """What to say if the time was up before every kind of step was measured; longest: tokens of the longest of them."""
    return (
        f"  the time was up before {unmeasured} of {designed} kinds of steps were measured, the longest of "
        f"{longest} tokens, whose times are extrapolated: give --seconds a larger value"
    )
