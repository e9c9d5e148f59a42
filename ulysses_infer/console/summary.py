"""Output after the last token: completions, then steps and time per mode."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ulysses_infer.console.run_view import RunView
from ulysses_infer.console.screen import mode_text, one_line, printable, timeline
from ulysses_infer.engine.stats import StepRecord
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.parallel.layout import Mode

TITLE_WIDTH = 32


def print_completions(console: Console, view: RunView, outputs: list[RequestOutput]) -> None:
    """Every prompt with all its completions, in full."""
    for index, output in enumerate(outputs):
        console.print(Rule(Text(f"{index}", style="bold"), align="left", style="bright_black"))
        for sequence in output.outputs:
            text = Text.assemble((printable(view.titles[index]), "dim"), printable(sequence.text))
            console.print(Padding(text, (0, 0, 1, 2)))


def print_summary(console: Console, view: RunView, outputs: list[RequestOutput], stats: dict[str, Any]) -> None:
    """The tables of modes and of requests."""
    marks = timeline(view.steps, console.width - 16)
    console.print(mode_table(view.steps))
    console.print(Text(f"  switches {stats['switches']}  ", style="dim").append_text(marks), Text(), sep="\n")
    console.print(request_table(view, outputs))


def mode_table(steps: list[StepRecord]) -> Table:
    """Steps, tokens and seconds of each mode, most steps first."""
    table = _table("mode", "steps", "tokens", "seconds", "tokens/s", "ms/step")
    by_mode: dict[Mode, list[StepRecord]] = {}
    for step in steps:
        by_mode.setdefault(step.mode, []).append(step)
    for mode, own in sorted(by_mode.items(), key=lambda item: -len(item[1])):
        table.add_row(mode_text(mode), *_totals(own))
    if len(by_mode) > 1:
        table.add_section()
        table.add_row("all", *_totals(steps))
    return table


def _totals(steps: list[StepRecord]) -> list[str]:
    tokens, seconds = sum(step.num_tokens for step in steps), sum(step.seconds for step in steps)
    rates = [f"{tokens / seconds:.0f}", f"{seconds / len(steps) * 1e3:.1f}"]
    return [str(len(steps)), str(tokens), f"{seconds:.2f}", *rates]


def request_table(view: RunView, outputs: list[RequestOutput]) -> Table:
    """Time to first token (TTFT) and time per output token (TPOT) of each request."""
    table = _table("request", "first at", "prompt", "output", "TTFT ms", "TPOT ms", "ended by")
    for index, output in enumerate(outputs):
        metrics = output.metrics
        assert metrics is not None
        table.add_row(
            f"{index}  {one_line(view.titles[index], TITLE_WIDTH)}",
            f"step {view.first_steps[index]}" if index in view.first_steps else "-",
            str(len(output.prompt_token_ids)),
            str(sum(len(sequence.token_ids) for sequence in output.outputs)),
            _milliseconds(metrics.ttft),
            _milliseconds(metrics.tpot),
            ", ".join(dict.fromkeys(str(sequence.finish_reason) for sequence in output.outputs)),
        )
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, header_style="bold", show_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
