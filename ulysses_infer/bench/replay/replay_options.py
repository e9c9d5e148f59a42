"""The options of `bench replay`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ulysses_infer.bench.replay.scaling import Scale, Window, paper_window
from ulysses_infer.bench.serve.serve_options import (
    OptionParser,
    add_output,
    add_prompt_format,
    add_server,
    check_common,
    positive,
    positive_number,
)
from ulysses_infer.errors import ConfigError

LARGEST_FACTOR = 1e9
DESCRIPTION = """\
Send the requests of a trace to a server at their recorded times, whether or not earlier ones are answered. TRACE is
Mooncake's JSON lines (timestamp in ms, input_length, output_length, hash_ids) or Azure's CSV. Prompts are random tokens
of the trace's lengths; equal hash ids in Mooncake's traces give shared prefixes. Answers are as long as in the trace:
the model's end token is ignored unless --stop-at-eos is given."""


def parse_replay(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options. Raises `ConfigError` for contradictions, SystemExit after `--help`."""
    parser = OptionParser(
        prog="ulysses-infer bench replay",
        usage="ulysses-infer bench replay TRACE --base-url URL [options]",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="file to replay")
    add_server(parser)
    add_part(parser)
    _add_sending(parser)
    add_output(parser)
    parser.add_argument(
        "--stop-at-eos",
        dest="ignore_eos",
        action="store_false",
        default=True,
        help="end answers at the model's end token",
    )
    parser.set_defaults(ignore_eos=True)
    options = parser.parse_args(list(arguments))
    check_common(options)
    check_window(options)
    return options


def add_part(parser: argparse.ArgumentParser) -> None:
    """Add the options that select and scale a part of a trace."""
    group = parser.add_argument_group("part of the trace")
    group.add_argument(
        "--window",
        choices=("paper",),
        help="the window of the Shift Parallelism paper: minutes 2 to 17 of Azure's code "
        "trace, 0 to 15 of Mooncake's conversations",
    )
    group.add_argument("--start-minute", type=_minute, metavar="M", help="default: 0")
    group.add_argument("--end-minute", type=_minute, metavar="M", help="default: the end of the trace")
    group.add_argument(
        "--time-scale",
        type=_factor,
        default=1.0,
        metavar="S",
        help="factor of times: 0.5 is twice as fast; default: 1",
    )
    group.add_argument(
        "--length-scale",
        type=_factor,
        default=1.0,
        metavar="S",
        help="factor of token counts, shared prefixes included; default: 1",
    )
    group.add_argument("--max-input-len", type=positive, metavar="N", help="truncate longer prompts")
    group.add_argument("--max-output-len", type=positive, metavar="N", help="truncate longer answers")
    group.add_argument("--num-prompts", type=positive, metavar="N", help="only N of the requests, evenly chosen")
    group.add_argument("--seed", type=int, default=0, help="seed of prompts and arrivals; default: 0")


def _add_sending(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sending")
    group.add_argument("--max-concurrency", type=positive, metavar="N", help="maximum number of requests in flight")
    add_prompt_format(group)


def check_window(options: argparse.Namespace) -> None:
    """Raise `ConfigError` if the window is given twice or is empty."""
    given = (options.start_minute, options.end_minute)
    if options.window is not None and given != (None, None):
        raise ConfigError("--window and --start-minute or --end-minute: give one of them")
    if None not in given and given[0] >= given[1]:
        raise ConfigError(f"--start-minute {given[0]:g} is not before --end-minute {given[1]:g}")


def window_of(options: argparse.Namespace) -> Window:
    """The window of the trace that the options select. Raises `ConfigError`."""
    if options.window == "paper":
        return paper_window(options.trace)
    return Window(options.start_minute or 0.0, math.inf if options.end_minute is None else options.end_minute)


def scale_of(options: argparse.Namespace) -> Scale:
    """The scaling that the options specify."""
    return Scale(options.time_scale, options.length_scale, options.max_input_len, options.max_output_len)


def _factor(text: str) -> float:
    factor = positive_number(text)
    if factor > LARGEST_FACTOR:
        raise argparse.ArgumentTypeError(f"{text!r} is above {LARGEST_FACTOR:g}")
    return factor


def _minute(text: str) -> float:
    try:
        minute = float(text)
    except ValueError:
        minute = -1.0
    if not 0 <= minute < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a minute of at least 0")
    return minute
