"""Output for log files: completions line by line, each with the number of its request."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ulysses_infer.console.run_view import RunView
from ulysses_infer.console.screen import mode_name, one_line, printable
from ulysses_infer.outputs import RequestOutput

LONG_LINE = 100  # a line this long is shown before it is complete
TITLE_WIDTH = 80


class LineDisplay:
    """Prints what is new after each step. `[3]` is the number of the request, `---` a change of mode.

    Blank lines are left out: between lines of other requests they carry no information.
    """

    def __init__(self, console: Console, view: RunView, show_text: bool) -> None:
        self._console, self._view, self._show_text = console, view, show_text
        self._printed: dict[int, int] = {}  # characters printed of each request

    def __enter__(self) -> LineDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def on_step(self) -> None:
        """Print a change of mode, and whole lines of text."""
        steps = self._view.steps
        if len(steps) == 1 or steps[-1].mode != steps[-2].mode:
            self._print(f"--- step {len(steps) - 1}: {mode_name(steps[-1].mode)}, {steps[-1].num_tokens} tokens")
        if self._show_text:
            for index, output in sorted(self._view.outputs.items()):
                self._show(index, output)

    def _show(self, index: int, output: RequestOutput) -> None:
        if index not in self._printed:
            self._print(f"[{index}] > {one_line(self._view.titles[index], TITLE_WIDTH)}")
            self._printed[index] = 0
        elif self._printed[index] < 0:
            return
        text = output.outputs[0].text
        for piece in complete_pieces(text[self._printed[index] :], output.finished):
            self._printed[index] += len(piece)
            if piece.strip():
                self._print(f"[{index}] {printable(piece.rstrip())}")
        if output.finished:
            self._printed[index] = -1
            self._print(f"[{index}] = {len(output.outputs[0].token_ids)} tokens, {output.outputs[0].finish_reason}")

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def complete_pieces(text: str, is_all: bool) -> list[str]:
    """`text` in lines, without an incomplete last line; long lines are broken at a space."""
    pieces = []
    for line in text.splitlines(keepends=True):
        rest = line
        while len(rest) > LONG_LINE:
            cut = rest.rfind(" ", 1, LONG_LINE) + 1 or LONG_LINE
            pieces.append(rest[:cut])
            rest = rest[cut:]
        if rest and (is_all or rest.endswith("\n")):
            pieces.append(rest)
    return pieces
