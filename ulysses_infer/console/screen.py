"""The terminal or log file of rank 0, and the style of modes on it."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.text import Text

from ulysses_infer.engine.stats import StepRecord
from ulysses_infer.parallel.layout import Mode

LOG_WIDTH = 110  # without a terminal
SHOW_CURSOR = "\x1b[?25h"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def make_console(rank: int) -> Console:
    """A console for standard output, as wide as the terminal or `LOG_WIDTH`; other ranks than 0 print nothing."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False, quiet=rank > 0)


def restore_cursor() -> None:
    """Show the cursor again, which a live display hides; called when a process ends in the middle of one.

    The live display also replaces `sys.stdout`, so this writes to the original.
    """
    terminal = sys.__stdout__
    if terminal is not None and terminal.isatty():
        terminal.write(f"{SHOW_CURSOR}\n")
        terminal.flush()


def printable(text: str) -> str:
    """`text` without control characters, so that a model's output cannot control the terminal."""
    return CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def one_line(text: str, width: int) -> str:
    """The beginning of `text` on one line of at most `width` characters."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def mode_name(mode: Mode) -> str:
    """A mode in words: `SP 2`, `TP 2`, `SP 4 x TP 2`."""
    parts = [f"{kind} {size}" for kind, size in (("SP", mode.sp), ("TP", mode.tp)) if size > 1]
    return " x ".join(parts) or "1 rank"


def mode_style(mode: Mode) -> str:
    """The colour of a mode on every display: sequence parallel cyan, tensor parallel magenta, both yellow."""
    if mode.sp > 1:
        return "cyan" if mode.tp == 1 else "yellow"
    return "magenta"


def mode_mark(mode: Mode) -> str:
    """One character for a step in this mode, which distinguishes modes without colours."""
    if mode.sp > 1:
        return "■" if mode.tp == 1 else "▣"
    return "□"


def mode_text(mode: Mode) -> Text:
    """A mode's mark and name in its colour."""
    return Text(f"{mode_mark(mode)} {mode_name(mode)}", style=mode_style(mode))


def timeline(steps: list[StepRecord], width: int) -> Text:
    """The modes of steps as a row of coloured marks, at most `width` of them.

    A mark that stands for several steps shows the rarest mode among them, so that switches stay visible.
    """
    text = Text()
    totals = {mode: sum(step.mode == mode for step in steps) for mode in {step.mode for step in steps}}
    cells = min(width, len(steps))
    for cell in range(cells):
        covered = steps[cell * len(steps) // cells : (cell + 1) * len(steps) // cells]
        mode = min((step.mode for step in covered), key=totals.__getitem__)
        text.append(mode_mark(mode), style=mode_style(mode))
    return text
