"""The display of a run: live on a terminal, as lines in a log, as tables at the end."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ulysses_infer.console.lines import LONG_LINE, LineDisplay, complete_pieces
from ulysses_infer.console.panels import LiveDisplay
from ulysses_infer.console.run_view import RunView
from ulysses_infer.console.screen import mode_name, one_line, printable, timeline
from ulysses_infer.console.summary import mode_table, request_table
from ulysses_infer.engine.stats import StepRecord
from ulysses_infer.outputs import CompletionOutput, RequestMetrics, RequestOutput
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.sampling_params import SamplingParams

SP, TP = Mode(2, 1), Mode(1, 2)


def step(sequence: int, mode: Mode, num_tokens: int = 1, seconds: float = 0.5) -> StepRecord:
    return StepRecord(sequence, mode, num_tokens, num_tokens, seconds)


def output(text: str, num_tokens: int, finish_reason: str | None = None) -> RequestOutput:
    completion = CompletionOutput(0, text, list(range(num_tokens)), finish_reason=finish_reason)
    metrics = RequestMetrics(10.0, 10.0, 10.25, 12.25, num_output_tokens=num_tokens)
    return RequestOutput("r", None, [1, 2, 3], [completion], finish_reason is not None, metrics=metrics)


def make_view(*titles: str, max_tokens: int | None = 8) -> RunView:
    return RunView(list(titles), [SamplingParams(max_tokens=max_tokens)] * len(titles), [0] * len(titles))


def shown(display_type: type, view: RunView, width: int = 100, height: int = 30) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, height=height)
    display = display_type(console, view, True)
    if isinstance(display, LiveDisplay):
        console.print(display.render())
    else:
        display.on_step()
    return file.getvalue()


def test_view_counts_tokens_that_may_still_come() -> None:
    view = make_view("a", "b")
    assert view.most_tokens == 16

    view.take({0: output("x", 3, "stop")}, [step(0, SP)])

    assert (view.num_tokens, view.most_tokens) == (3, 3 + 8)
    assert (view.count(finished=True), view.count(finished=False)) == (1, 0)


def test_view_knows_no_end_without_a_limit() -> None:
    assert make_view("a", max_tokens=None).most_tokens is None


def test_log_shows_whole_lines_as_they_come_and_the_rest_at_the_end() -> None:
    view = make_view("def f():")
    file = io.StringIO()
    display = LineDisplay(Console(file=file, width=100), view, True)
    for number, (text, reason) in enumerate([("a\nb", None), ("a\nbc", None), ("a\nbc\nd", "length")]):
        view.take({0: output(text, number + 1, reason)}, [step(number, SP if number == 0 else TP)])
        display.on_step()

    assert file.getvalue().splitlines() == [
        "--- step 0: SP 2, 1 tokens",
        "[0] > def f():",
        "[0] a",
        "--- step 1: TP 2, 1 tokens",
        "[0] bc",
        "[0] d",
        "[0] = 3 tokens, length",
    ]


def test_long_line_is_cut_at_a_space_before_its_end_has_come() -> None:
    words = "word " * LONG_LINE
    pieces = complete_pieces(words, is_all=False)

    assert all(len(piece) <= LONG_LINE and piece.endswith(" ") for piece in pieces)
    assert words.startswith("".join(pieces))
    assert "".join(complete_pieces(words, is_all=True)) == words


@pytest.mark.parametrize(("width", "height"), [(100, 30), (60, 12), (200, 60)])
def test_live_display_fits_the_terminal(width: int, height: int) -> None:
    view = make_view(*[f"prompt {index}" for index in range(9)])
    view.take({index: output("line\n" * 50, 5) for index in range(6)}, [step(0, SP)])

    lines = shown(LiveDisplay, view, width, height).splitlines()

    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_live_display_shows_the_newest_text_and_the_mode() -> None:
    view = make_view("the prompt", "later")
    view.take({0: output("first\n" * 40 + "newest", 5)}, [step(0, TP)])

    text = shown(LiveDisplay, view)

    assert "newest" in text
    assert "TP 2" in text
    assert "arrives at step 0" in text


def test_model_output_cannot_control_the_terminal() -> None:
    assert "\x1b" not in printable("\x1b[2Jgone")
    assert printable("a\tb\nc") == "a\tb\nc"
    view = make_view("p")
    view.take({0: output("\x1b]0;title\x07", 1, "stop")}, [step(0, SP)])
    assert "\x1b" not in shown(LineDisplay, view)


def test_timeline_keeps_a_rare_mode_visible_however_short_it_is() -> None:
    steps = [step(i, SP if i == 500 else TP) for i in range(1000)]

    assert timeline(steps, 40).plain.count("■") == 1
    assert len(timeline(steps, 40).plain) == 40
    assert timeline(steps[499:502], 40).plain == "□■□"


def test_mode_table_adds_up() -> None:
    table = mode_table([step(0, SP, 100), step(1, TP, 2), step(2, TP, 2)])

    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert columns[0] == ["□ TP 2", "■ SP 2", "all"]
    assert columns[1] == ["2", "1", "3"]
    assert columns[2] == ["4", "100", "104"]
    assert columns[3] == ["1.00", "0.50", "1.50"]


def test_request_table_shows_latencies_in_milliseconds() -> None:
    view, done = make_view("p"), output("text", 5, "stop")
    view.take({}, [step(0, SP)])
    view.take({0: done}, [step(1, TP)])

    table = request_table(view, [done])

    cells = [str(next(iter(column.cells))) for column in table.columns]
    assert cells == ["0  p", "step 1", "3", "5", "250.0", "500.0", "stop"]


def test_names_of_modes() -> None:
    assert [mode_name(Mode(*pair)) for pair in ((8, 1), (1, 8), (4, 2), (1, 1))] == [
        "SP 8",
        "TP 8",
        "SP 4 x TP 2",
        "1 rank",
    ]


def test_one_line_is_never_longer_than_asked() -> None:
    assert one_line("a\n  b", 10) == "a b"
    assert one_line("x" * 20, 10) == "x" * 9 + "…"
