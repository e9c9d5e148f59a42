"""The command line of `python -m benchmarks.compare_peers`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path

from benchmarks.compare_peers.catalogue import CONTENDERS, DEFAULT_PEERS, QUICK_PEERS
from benchmarks.compare_peers.measuring import FOREVER
from benchmarks.compare_peers.models import NAMES, SMOLLM2
from benchmarks.compare_peers.programs import LEVELS
from benchmarks.compare_peers.work import parse_work
from ulysses_infer.cache_folders import cache_folder

ALL = "all"
QUICK = {"models": "llama-60m", "peers": ",".join(QUICK_PEERS), "repeats": 3, "seconds": 330.0}
QUICK_HELP = "llama-60m, fewer peers, 3 rounds, 330 seconds; other options overrule these"


def parse(about: str, arguments: list[str]) -> argparse.Namespace:
    """The options; about: the program's documentation. Exits with one line for each mistake."""
    parser = argparse.ArgumentParser("compare_peers", description=about)
    names = ", ".join(CONTENDERS)
    models = f"llama-60m,qwen2.5-0.5b,{SMOLLM2}"
    parser.add_argument("--models", default=models, help=f"of {', '.join(NAMES)} (default: {models})")
    parser.add_argument("--peers", default=",".join(DEFAULT_PEERS), help=f"contenders, of {names}; or {ALL}")
    parser.add_argument("--level", default="native", help=f"instructions that all may use: {', '.join(LEVELS)}")
    parser.add_argument("--repeats", type=int, default=5, help="at most so many rounds (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each engine, all processes together (default 2)")
    sizes = "of a size that fits the time"
    parser.add_argument("--single", help=f"the single request: 1 x tokens in / out, as 1x512/64 (default: {sizes})")
    parser.add_argument("--concurrent", help=f"the concurrent requests, as 32x256/64 (default: {sizes})")
    parser.add_argument(
        "--environments",
        type=Path,
        default=cache_folder("peers"),
        help="folder for the peers' virtual environments (default: in the cache)",
    )
    parser.add_argument("--output", type=Path, default=Path("peers"), help="folder for results and logs (./peers)")
    parser.add_argument("--timeout", type=float, default=900, help="most seconds of one start or measurement (900)")
    parser.add_argument(
        "--seconds", type=float, default=840.0, help="for the whole run once all is prepared; 0: no limit (840)"
    )
    parser.add_argument("--check", action="store_true", help="first compare the first tokens in float32; takes longer")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of our own configuration")
    parser.set_defaults(**(QUICK if "--quick" in arguments else {}))
    options = parser.parse_args(arguments)
    options.seconds, options.stopped = options.seconds or FOREVER, False
    if options.peers == ALL:
        options.peers = ",".join(CONTENDERS)
    for field, known in (("models", NAMES), ("peers", CONTENDERS)):
        options.__dict__[field] = [name for name in getattr(options, field).split(",") if name]
        for name in getattr(options, field):
            _check_known(parser, field, name, known)
    _check_known(parser, "level", options.level, LEVELS)
    for field in ("single", "concurrent"):
        _parse_work(parser, options, field)
    for override in options.overrides:
        if "=" not in override:
            parser.error(f"{override!r} is not key=value")
    return options


def _check_known(parser: argparse.ArgumentParser, field: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        parser.error(f"--{field}: there is no {name!r}; the nearest is {near} (known: {', '.join(names)})")


def _parse_work(parser: argparse.ArgumentParser, options: argparse.Namespace, field: str) -> None:
    text = getattr(options, field)
    if text is None:
        return
    try:
        setattr(options, field, parse_work(text))
    except ValueError:
        parser.error(f"--{field}: {text!r} is not COUNTxTOKENS_IN/TOKENS_OUT, out at least 2")
