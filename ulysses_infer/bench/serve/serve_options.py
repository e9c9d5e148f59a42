"""The options of `bench serve`, including vLLM's spellings."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ulysses_infer.bench.serve.arrivals import Ramp, Rate
from ulysses_infer.bench.serve.repetition import REPETITIVE
from ulysses_infer.errors import ConfigError

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition", "timed_trace", *REPETITIVE)
FILE_DATASETS = ("sharegpt", "custom", "timed_trace")
ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
GOODPUT_MEASURES = ("ttft", "tpot", "e2el")
DEFAULT_NUM_PROMPTS = 1000
DESCRIPTION = """\
Measure a server with OpenAI's API, of this engine or another, under load. Requests are sent at their scheduled times,
whether or not earlier ones are answered (open loop); with --duration, --max-concurrency requests are kept in flight
(closed loop)."""


def parse_serve(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options. Raises `ConfigError` for invalid ones, SystemExit after `--help`."""
    parser = OptionParser(
        prog="ulysses-infer bench serve",
        usage="ulysses-infer bench serve --base-url URL [options]",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server(parser)
    _add_load(parser)
    _add_dataset(parser)
    add_output(parser)
    options = parser.parse_args(list(arguments))
    _check(options)
    return options


class OptionParser(argparse.ArgumentParser):
    """A parser that raises `ConfigError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Overrides argparse's. Raises `ConfigError`."""
        raise ConfigError(message)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options of the server and its connection."""
    group = parser.add_argument_group("server")
    group.add_argument("--base-url", metavar="URL", default="http://127.0.0.1:8000", help="default: %(default)s")
    group.add_argument("--model", metavar="NAME", help="default: the server's first model")
    group.add_argument(
        "--endpoint", type=_endpoint, default="completions", metavar="NAME", help="completions (default) or chat"
    )
    key = os.environ.get("OPENAI_API_KEY")
    group.add_argument("--api-key", metavar="KEY", default=key, help="default: the variable OPENAI_API_KEY")
    group.add_argument("--header", type=pair, action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    group.add_argument("--ca-file", metavar="FILE", help="certificates (PEM) to trust for https")
    group.add_argument(
        "--timeout",
        type=positive_number,
        default=3600.0,
        metavar="SECONDS",
        help="a request that takes longer has failed; default: %(default)s",
    )


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument("--num-prompts", type=positive, metavar="N", help="default: 1000, or all of a file")
    group.add_argument(
        "--request-rate",
        type=positive_number,
        default=math.inf,
        metavar="R",
        help="per second; inf (default): all at once",
    )
    group.add_argument(
        "--burstiness",
        type=positive_number,
        default=1.0,
        metavar="B",
        help="shape of the gamma-distributed gaps: 1 (default) is a Poisson process, less is burstier",
    )
    group.add_argument("--max-concurrency", type=positive, metavar="N", help="maximum number of requests in flight")
    group.add_argument(
        "--ramp-up",
        "--ramp-up-strategy",
        choices=("linear", "exponential"),
        help="increase or decrease the rate during the run",
    )
    group.add_argument("--ramp-up-from", "--ramp-up-start-rps", type=_rate, metavar="R", help="requests per second")
    group.add_argument("--ramp-up-to", "--ramp-up-end-rps", type=_rate, metavar="R", help="requests per second")
    group.add_argument(
        "--duration", type=positive_number, metavar="SECONDS", help="closed loop: keep --max-concurrency in flight"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of prompts and arrivals; default: 0")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dataset")
    group.add_argument(
        "--dataset",
        "--dataset-name",
        choices=DATASETS,
        default="random",
        help="default: %(default)s; the answers of code_edit, summary and json_records repeat parts of their prompts",
    )
    group.add_argument(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help="sharegpt: JSON; custom: JSON lines with prompt or messages and max_tokens; timed_trace: Mooncake's JSON "
        "lines or Azure's CSV",
    )
    number: dict[str, Any] = {"type": positive, "metavar": "N"}
    group.add_argument("--input-len", "--random-input-len", **number, default=1024, help="default: %(default)s")
    group.add_argument(
        "--output-len", "--random-output-len", **number, help="default: 128, or each request's length in the dataset"
    )
    group.add_argument(
        "--range-ratio",
        "--random-range-ratio",
        type=_ratio,
        default=0.0,
        metavar="R",
        help="lengths of random prompts vary by ± this share; default: 0",
    )
    group.add_argument("--prefix-len", **number, default=256, help="of prefix_repetition; default: %(default)s")
    group.add_argument("--suffix-len", **number, default=256, help="of prefix_repetition; default: %(default)s")
    group.add_argument("--num-prefixes", **number, default=10, help="of prefix_repetition; default: %(default)s")
    add_prompt_format(group)


def add_prompt_format(group: argparse._ArgumentGroup) -> None:
    """Add the options of random prompts."""
    group.add_argument(
        "--prompt-format",
        choices=("auto", "ids", "text"),
        default="auto",
        help="token ids (lengths are exact) or text; auto: ids where the server has /tokenize or --vocab-size is given",
    )
    group.add_argument("--vocab-size", type=positive, metavar="N", help="draw random token ids below N")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of request parameters and results."""
    group = parser.add_argument_group("requests and results")
    group.add_argument("--ignore-eos", action="store_true", help="always generate the full output length")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    group.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="additional fields of requests"
    )
    group.add_argument(
        "--goodput",
        type=_limit,
        nargs="+",
        default=[],
        metavar="MEASURE:MS",
        help="count requests within all of these limits, as in ttft:500 tpot:50 e2el:5000",
    )
    group.add_argument(
        "--percentiles", "--metric-percentiles", type=_percentiles, default=[99.0], metavar="P,P", help="default: 99"
    )
    group.add_argument("--metadata", type=pair, nargs="+", default=[], metavar="KEY=VALUE", help="added to the result")
    group.add_argument("--result-file", "--result-filename", type=Path, metavar="FILE", help="write the result as JSON")


def _check(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for options that contradict each other."""
    if options.dataset in FILE_DATASETS and options.dataset_path is None:
        raise ConfigError(f"--dataset {options.dataset} needs --dataset-path FILE")
    check_common(options)
    _check_ramp(options)
    is_paced = math.isfinite(options.request_rate) or options.ramp_up is not None
    if options.duration is not None and (options.max_concurrency is None or is_paced):
        raise ConfigError("--duration is a closed loop: it needs --max-concurrency, and takes no rate")
    if options.dataset == "timed_trace" and (is_paced or options.duration is not None):
        raise ConfigError("--dataset timed_trace has its own times: leave out rates and --duration")


def check_common(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for contradictory options that `bench serve` and `bench replay` share."""
    if options.endpoint == "chat" and options.prompt_format == "ids":
        raise ConfigError("--prompt-format ids: chat takes messages; use --endpoint completions")
    if options.result_file is not None and not options.result_file.absolute().parent.is_dir():
        raise ConfigError(f"--result-file '{options.result_file}': its folder does not exist; create it")


def _check_ramp(options: argparse.Namespace) -> None:
    ends = (options.ramp_up_from, options.ramp_up_to)
    if options.ramp_up is None:
        if ends != (None, None):
            raise ConfigError("--ramp-up-from and --ramp-up-to need --ramp-up linear or exponential")
        return
    if None in ends or math.inf in ends:
        raise ConfigError("--ramp-up needs --ramp-up-from and --ramp-up-to, both finite")
    if math.isfinite(options.request_rate):
        raise ConfigError("--ramp-up and --request-rate: give one of them")
    if ends[1] == 0 or (options.ramp_up == "exponential" and ends[0] == 0):
        raise ConfigError("a ramp may start at 0 only if it is linear, and must not end there")


def rate_of(options: argparse.Namespace, num_requests: int) -> Rate | Ramp:
    """The rate that the options specify."""
    if options.ramp_up is None:
        return Rate(options.request_rate)
    return Ramp(options.ramp_up_from, options.ramp_up_to, num_requests, options.ramp_up == "exponential")


def _endpoint(text: str) -> str:
    for name, path in ENDPOINTS.items():
        if text in (name, path):
            return name
    raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(ENDPOINTS)}")


def positive(text: str) -> int:
    """An integer of at least 1. Raises argparse's error."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """A number above 0. Raises argparse's error."""
    number = _number(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def _rate(text: str) -> float:
    number = _number(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return number


def _ratio(text: str) -> float:
    number = _number(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 0 and below 1")
    return number


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def pair(text: str) -> tuple[str, str]:
    """KEY=VALUE. Raises argparse's error."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _limit(text: str) -> tuple[str, float]:
    key, _, value = text.partition(":")
    if key not in GOODPUT_MEASURES:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(f'{m}:MS' for m in GOODPUT_MEASURES)}")
    return key, positive_number(value)


def _percentiles(text: str) -> list[float]:
    numbers = [_number(part) for part in text.split(",")]
    for number in numbers:
        if not 0 <= number <= 100:
            raise argparse.ArgumentTypeError(f"{number:g} is not from 0 to 100")
    return numbers


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
