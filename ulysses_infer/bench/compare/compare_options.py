"""The options of `bench compare`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ulysses_infer.bench.compare.contenders import CONTENDERS
from ulysses_infer.bench.compare.protocols import PROTOCOLS, REPETITION, SCALES
from ulysses_infer.bench.serve.serve_options import pair, positive, positive_number
from ulysses_infer.config.speculation import METHODS
from ulysses_infer.errors import ConfigError

MOST_SERVERS = 2  # that share the memory


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options except MODEL and the recipe's."""
    _add_selection(parser)
    _add_load(parser)
    _add_output(parser)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    protocols = ", ".join(f"{protocol.name} ({protocol.about})" for protocol in PROTOCOLS.values())
    parser.add_argument(
        "--protocol",
        type=_names_of(PROTOCOLS),
        default=[name for name in PROTOCOLS if name != REPETITION],
        metavar="P,P",
        help=f"one or more of {protocols}; default: all but {REPETITION}",
    )
    parser.add_argument(
        "--contenders",
        type=_names_of(CONTENDERS),
        default=list(CONTENDERS),
        metavar="C,C",
        help=f"default: {','.join(CONTENDERS)}",
    )
    parser.add_argument(
        "--speculation",
        type=_names_of(METHODS[1:]),
        default=[],
        metavar="M,M",
        help=f"further contenders: the adaptive policy with drafts of {', '.join(METHODS[1:])}; see --protocol "
        f"{REPETITION}",
    )


def _add_load(parser: argparse.ArgumentParser) -> None:
    number: dict[str, Any] = {"type": positive, "metavar": "N"}
    parser.add_argument("--ranks", **number, help="default: the number in the recipe, at least 2")
    parser.add_argument("--repeats", **number, default=3, help="interleaved; default: %(default)s")
    parser.add_argument("--scale", choices=SCALES, default="laptop", help="sizes of all loads; default: %(default)s")
    parser.add_argument("--input-len", **number, help="tokens per prompt, instead of the scale's")
    parser.add_argument("--output-len", **number, help="tokens per answer, instead of the scale's")
    parser.add_argument(
        "--seconds", type=positive_number, metavar="S", help="duration of each timed load, instead of the scale's"
    )
    parser.add_argument(
        "--trace", type=Path, action="append", default=[], metavar="FILE", help="trace for protocol trace; repeatable"
    )
    parser.add_argument(
        "--in-turn", action="store_true", help="run one server at a time: slower, but each has all of the memory"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("compare"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--redraw", action="store_true", help="do not measure; rebuild the report from the results in FOLDER"
    )
    parser.add_argument(
        "--note", type=pair, action="append", default=[], metavar="KEY=VALUE", help="added to the report; repeatable"
    )
    parser.add_argument(
        "--launch",
        type=shlex.split,
        metavar="COMMAND",
        help="starts a server instead of ulysses-infer; its arguments are the number of ranks and those of the server",
    )


def check_options(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for contradictory options."""
    if options.protocol == ["trace"] and not options.trace and not options.redraw:
        raise ConfigError("--protocol trace needs --trace FILE, of Azure's CSV or Mooncake's JSON lines")
    servers = {CONTENDERS[name].server for name in options.contenders} | set(options.speculation)
    if len(servers) > MOST_SERVERS and not options.in_turn:
        raise ConfigError(
            f"--speculation {','.join(options.speculation)}: {len(servers)} servers do not fit at once; add --in-turn, "
            "or leave out methods or --contenders"
        )
    for path in options.trace:
        if not path.is_file():
            raise ConfigError(f"--trace '{path}' is not a file")
    if options.output.exists() and not options.output.is_dir():
        raise ConfigError(f"--output '{options.output}' is not a folder")


def _names_of(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: choose from {', '.join(known)}")
        if len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"{text!r} contains a name twice")
        return names

    return parse
