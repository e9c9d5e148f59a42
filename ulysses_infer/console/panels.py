"""The live terminal display: one panel per request, with progress and the mode of every step."""

from __future__ import annotations

import time

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.console.run_view import RunView
from ulysses_infer.console.screen import mode_style, mode_text, one_line, printable, timeline

REFRESH_SECONDS = 0.1  # drawing takes milliseconds, too long for every step
FOOTER_LINES = 4
WIDE = 96  # columns from which two panels fit side by side
MOST_BODY_LINES = 10
TAIL_CHARACTERS = 4000


class LiveDisplay:
    """Redraws itself between steps, at most every `REFRESH_SECONDS`, and is erased at the end."""

    def __init__(self, console: Console, view: RunView, show_text: bool) -> None:
        self._console, self._view, self._show_text = console, view, show_text
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def on_step(self) -> None:
        """Draw the current state, unless it was drawn a moment ago."""
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        """The whole display."""
        parts = [self._panels()] if self._show_text else []
        return Group(*parts, self._footer())

    def _panels(self) -> RenderableType:
        across = 2 if self._console.width >= WIDE and len(self._view.titles) > 1 else 1
        room = self._console.height - FOOTER_LINES
        down = min(ceil_div(len(self._view.titles), across), max(1, room // 4))
        body_lines = min(MOST_BODY_LINES, max(1, room // down - 2))
        shown = sorted(self._by_interest()[: across * down])
        width = self._console.width // across - (across > 1)
        return Columns([self._panel(index, width, body_lines) for index in shown], padding=(0, 1), expand=False)

    def _by_interest(self) -> list[int]:
        """Requests in display order: running ones, then waiting ones, then those that ended last."""
        outputs = self._view.outputs

        def interest(index: int) -> tuple[int, int]:
            if index not in outputs:
                return 1, index
            return (2, -index) if outputs[index].finished else (0, index)

        return sorted(range(len(self._view.titles)), key=interest)

    def _panel(self, index: int, width: int, body_lines: int) -> Panel:
        output = self._view.outputs.get(index)
        title = Text(f" {index} ", style="bold").append(one_line(self._view.titles[index], width - 12), style="dim")
        if output is None:
            note, style = f"arrives at step {self._view.arrivals[index]}", "bright_black"
        elif output.finished:
            note, style = f"{output.outputs[0].finish_reason}", "green"
        else:
            note, style = "", mode_style(self._view.steps[-1].mode)
        tokens = sum(len(sequence.token_ids) for sequence in output.outputs) if output else 0
        subtitle = " · ".join(filter(None, [f"{tokens} tokens" if tokens else "", note]))
        return Panel(
            self._body(index, width - 4, body_lines),
            title=title,
            title_align="left",
            subtitle=Text(subtitle, style="dim"),
            subtitle_align="right",
            width=width,
            height=body_lines + 2,
            border_style=style,
        )

    def _body(self, index: int, width: int, num_lines: int) -> Text:
        """The last lines of prompt and completion."""
        output = self._view.outputs.get(index)
        text = Text(printable(self._view.titles[index])[-TAIL_CHARACTERS:], style="dim")
        if output is not None:
            text = Text.assemble(text, (printable(output.outputs[0].text)[-TAIL_CHARACTERS:], "default not dim"))
        lines = text.wrap(self._console, width, overflow="fold")
        return Text("\n").join(lines[-num_lines:])

    def _footer(self) -> RenderableType:
        view = self._view
        if not view.steps:
            return Text("  waiting for the first step", style="dim")
        step, most = view.steps[-1], view.most_tokens
        width = max(10, self._console.width // 3)
        bar = ProgressBar(total=most, completed=view.num_tokens, width=width, pulse=most is None)
        grid = Table.grid(padding=(0, 2, 0, 0))
        rate = view.num_tokens / max(view.seconds, 1e-9)
        counts = f"{view.count(finished=False)} running · {view.count(finished=True)} done"
        tokens = f"{view.num_tokens}/{most}" if most is not None else f"{view.num_tokens}"
        grid.add_row(Text("  tokens", style="dim"), bar, tokens, f"{rate:.0f} tok/s", Text(counts, style="dim"))
        now = Text(f"  step {len(view.steps)}  ", style="dim").append_text(mode_text(step.mode))
        now.append(f"  {step.num_tokens} tokens".ljust(13), style="dim")
        recent = view.steps[-(self._console.width - now.cell_len - 2) :]
        return Group(Text(), grid, now.append("  ").append_text(timeline(recent, len(recent))))
