"""The options of `ulysses-infer plan`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ulysses_infer.bench.replay.replay_options import add_part, check_window
from ulysses_infer.bench.serve.serve_options import OptionParser, positive, positive_number
from ulysses_infer.errors import ConfigError
from ulysses_infer.planning.sizes import WEIGHT_BYTES

TARGETS = ("ttft", "tpot", "latency")
DEFAULT_ACCEPTANCE = 0.6
FORM = "METHOD[:acceptance=P][,num_tokens=N][,coverage=P]"
"""How --speculation is written."""
DESCRIPTION = """\
Predict how a model would run on hardware that you may not have: every layout that fits, under each policy, on the
given traffic. The engine's own scheduler, block pools and policies run in virtual time; only step times are modelled.
MODEL is a folder, a config.json or a hub id, of which only config.json is read."""


def parse_plan(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options. Raises `ConfigError` for contradictions, SystemExit after `--help`."""
    parser = OptionParser(
        prog="ulysses-infer plan",
        usage="ulysses-infer plan MODEL --hardware NAME [--trace FILE | --rate R] [options]",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--hardware", required=True, metavar="NAME", help="a known node, as 8xh200, or a YAML file")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="nodes; replicas do not span them")
    parser.add_argument("--dtype", choices=sorted(WEIGHT_BYTES), help="of matrix products; default: the checkpoint's")
    parser.add_argument("--cache-dtype", choices=("auto", "fp8"), default="auto", help="default: %(default)s")
    parser.add_argument("--max-model-len", type=positive, metavar="N", help="default: what the model supports")
    parser.add_argument("--max-num-seqs", type=positive, default=1024, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--max-num-batched-tokens", type=positive, default=8192, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--offload-host-bytes",
        type=positive,
        default=0,
        metavar="N",
        help="host memory per rank for evicted prefixes (cache.offload_host_bytes); default: none",
    )
    parser.add_argument(
        "--offload-disk-bytes", type=positive, default=0, metavar="N", help="disk space per rank below it"
    )
    parser.add_argument("--offload-disk-folder", metavar="FOLDER", help="for the recipe: a folder on a fast local disk")
    parser.add_argument(
        "--block-size",
        type=positive,
        metavar="N",
        help="tokens per cache block of the simulation; default: by the length of the requests, 16 to 128",
    )
    parser.add_argument("--expert-placement", choices=("auto", "replicate", "expert", "width"), default="auto")
    parser.add_argument(
        "--expert-imbalance",
        type=_at_least_one,
        default=1.0,
        metavar="F",
        help="tokens of the rank with the busiest experts over the mean of all ranks; default: even routing",
    )
    parser.add_argument(
        "--speculation",
        metavar="SPEC",
        help=f"speculative decoding, {FORM}: the chance that a drafted token is right (default: "
        f"{DEFAULT_ACCEPTANCE}), drafted tokens of a request per step (default: auto), and the share of its steps for "
        "which something is proposed (default: 1)",
    )
    parser.add_argument(
        "--allow-unverified", action="store_true", help="plan a model type that has not been verified (docs/models.md)"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="step times that ulysses-infer calibrate measured")
    _add_traffic(parser)
    _add_results(parser)
    options = parser.parse_args(list(arguments))
    _check(options)
    return options


def _add_traffic(parser: OptionParser) -> None:
    group = parser.add_argument_group("traffic")
    group.add_argument("--trace", type=Path, metavar="FILE", help="Mooncake's .jsonl or Azure's .csv")
    group.add_argument("--input-len", type=positive, default=4096, metavar="N", help="default: %(default)s")
    group.add_argument("--output-len", type=positive, default=250, metavar="N", help="default: %(default)s")
    group.add_argument("--rate", type=positive_number, metavar="R", help="requests per second; default: all at once")
    group.add_argument("--bursty", action="store_true", help="arrivals in bursts (gamma distribution of shape 0.25)")
    add_part(parser)


def _add_results(parser: OptionParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--slo", nargs="+", type=_target, default=[], metavar="METRIC:MS", help="targets, as ttft:500 tpot:50"
    )
    group.add_argument("--price", type=_price, metavar="P", help="of one device for an hour: cost per M tokens")
    group.add_argument("--explain", metavar="LAYOUT", help="operations of two steps of a layout, as sp8xtp1")
    group.add_argument("--recipe", type=Path, metavar="FILE", help="write the recipe of the best layout")
    group.add_argument("--report", type=Path, metavar="FILE", help="write an HTML report")


def _at_least_one(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return factor


def _price(text: str) -> float:
    price = positive_number(text)
    if price == math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price")
    return price


def _target(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if name not in TARGETS or not limit > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC:MS with METRIC one of {', '.join(TARGETS)}")
    return name, limit


def _check(options: argparse.Namespace) -> None:
    if options.trace is not None and (options.rate is not None or options.bursty):
        raise ConfigError(
            "--trace has its own arrival times; leave out --rate and --bursty, or scale it by --time-scale"
        )
    if len(dict(options.slo)) < len(options.slo):
        raise ConfigError("--slo: a metric is given twice; give one target for each")
    if options.bursty and options.rate is None:
        raise ConfigError("--bursty needs --rate")
    if options.offload_disk_bytes and not (options.offload_host_bytes and options.offload_disk_folder):
        raise ConfigError(
            "--offload-disk-bytes: blocks come from host memory, to a folder; give --offload-host-bytes and "
            "--offload-disk-folder, too"
        )
    check_window(options)
