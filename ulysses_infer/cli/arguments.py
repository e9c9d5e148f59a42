"""The grammar of the command line, the same for `ulysses-infer` and for `launch.py`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ulysses_infer.bench.compare.compare_options import add_options, check_options
from ulysses_infer.bench.replay.replay_options import parse_replay
from ulysses_infer.bench.serve.serve_options import parse_serve
from ulysses_infer.config import Config, load_config
from ulysses_infer.config.aliases import flag_names, is_switch, split_flags
from ulysses_infer.errors import ConfigError
from ulysses_infer.extras import require_extra
from ulysses_infer.job.processes import is_launched
from ulysses_infer.planning.options import parse_plan

BENCHMARKS = ("latency", "throughput", "rollouts")
CLIENTS = ("bench serve", "bench replay", "bench compare", "plan")
"""Commands that run in a single process without ranks."""
MODES = ("tp", "sp", "shift", "adaptive", "single")
DEFAULT_MODES = {"rollouts": ["tp", "sp", "shift", "adaptive"]}
"""The modes that a benchmark measures; of those not named here, tp, sp, shift and single."""
DEFAULT_SIZES = {
    "latency": {"input_len": 512, "output_len": 64, "num_prompts": 1, "samples": 1},
    "throughput": {"input_len": 256, "output_len": 64, "num_prompts": 32, "samples": 1},
    "rollouts": {"input_len": 256, "output_len": 64, "num_prompts": 32, "samples": 8},
}
"""The workload of a benchmark."""
ROLLOUTS_SECONDS = 240.0  # for all runs of `bench rollouts` with the default workload
RANDOM_MODELS = ("llama-60m", "llama-0.5b")
SHORT_FLAGS = {"tensor_parallel_size": ("-tp",), "data_parallel_size": ("-dp",)}
LISTS = ("lora_modules", "allowed_origins")
"""Flags that take several values."""
DEFAULT_MAX_TOKENS = 128  # for prompts given on the command line

USAGE = """\
usage: ulysses-infer COMMAND [MODEL] [--config RECIPE] [options] [key=value ...]

commands:
  generate              complete prompts: --prompt TEXT, or those of the recipe; --dry-run: print what would start
  bench latency         time to first token and per token of a lone request, in every mode
  bench throughput      tokens per second of many requests together, in every mode
  bench rollouts        samples of prompts with a long tail of lengths: time until the last ends, in every mode
  bench serve           load on a server that speaks OpenAI's format, this one or another
  bench replay          a trace of production traffic on such a server
  bench compare         dp, tp, sp and shift on this machine: a report with plots
  serve                 answer HTTP requests in OpenAI's format, until a signal ends it
  calibrate             measure the step times of every mode, for policy adaptive
  plan                  predict layouts, latencies and throughput on hardware that you may not have

MODEL is a hub id or a folder, unless the recipe names one. Any key of a recipe can be set, as in parallel.sp=2.
`ulysses-infer COMMAND --help` has the options of a command; --version prints the version.

  ulysses-infer generate models/demo --prompt "def main():" parallel.sp=2
  ulysses-infer bench latency --config recipes/demo.yaml --modes tp,sp,shift,single
  ulysses-infer serve models/demo parallel.sp=2 --port 8000

The same commands run under a launcher:  deepspeed --num_gpus 2 ulysses_infer/launch.py generate --config RECIPE
"""


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    name: str
    """generate | bench | bench serve | bench replay | bench compare | serve | calibrate | plan"""
    options: argparse.Namespace
    overrides: list[str]
    """Recipe settings, as `load_config` takes them."""

    @property
    def is_dry(self) -> bool:
        """Whether the command only prints what a start would do."""
        return getattr(self.options, "dry_run", False)

    @property
    def is_on_ray(self) -> bool:
        """Whether a Ray cluster runs the ranks."""
        return getattr(self.options, "ray", False)

    def config(self) -> Config:
        """The configuration this command runs with. Raises `ConfigError`."""
        if self.name in CLIENTS:
            raise ConfigError(f"{self.name} runs in one process, without ranks; run it without a launcher")
        if self.name == "serve" and not self.is_dry:
            require_extra("serve", "serve")
        if self.is_on_ray:
            self._check_ray()
        config = load_config(self.options.config, self.overrides)
        if self.name != "generate" or self.is_dry:
            return config
        given = _given_prompts(self.options)
        if given:
            return dataclasses.replace(config, generate=_with_prompts(config.generate, given))
        if not config.generate.prompts:
            raise ConfigError("there is nothing to generate; give --prompt TEXT, or generate.prompts in the recipe")
        return config

    def _check_ray(self) -> None:
        if self.is_dry:
            raise ConfigError("--ray and --dry-run: give one of them")
        if is_launched():
            raise ConfigError("serve --ray starts its ranks on the Ray cluster; run it without a launcher")
        require_extra("serve --ray", "ray")


def parse(arguments: Sequence[str]) -> Command:
    """Parse a command line. Raises `ConfigError` if it is invalid, SystemExit after `--help`."""
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help", "help"):
        print(USAGE, end="")
        raise SystemExit(0 if name else 2)
    if name == "--version":
        from ulysses_infer.version import __version__

        print(f"ulysses-infer {__version__}")
        raise SystemExit(0)
    parsers = {"generate": _parse_generate, "bench": _parse_bench, "serve": _parse_serve, "calibrate": _parse_calibrate}
    parsers["plan"] = _parse_plan
    if name not in parsers:
        raise ConfigError(f"unknown command {name!r}; choose from {', '.join(parsers)}")
    return parsers[name](rest)


class _Parser(argparse.ArgumentParser):
    """An argparse parser that accepts options anywhere and raises our one-line errors."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"ulysses-infer {command}",
            usage=f"ulysses-infer {command} [MODEL] [options] [key=value ...]",
            description=description,
            allow_abbrev=False,
            conflict_handler="resolve",  # a command's own option replaces the alias
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        self.add_argument("--config", metavar="RECIPE", help="recipe to start from (YAML)")
        self.add_argument("--model", help=argparse.SUPPRESS)
        for alias in flag_names():
            words = alias.replace("_", "-")
            flags = [*SHORT_FLAGS.get(alias, ()), f"--{words}"] + [f"--no-{words}"] * is_switch(alias)
            arity: dict[str, Any] = {"nargs": 0} if is_switch(alias) else {"nargs": "+"} if alias in LISTS else {}
            self.add_argument(*flags, action=_Override, help=argparse.SUPPRESS, **arity)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_command(self, arguments: list[str]) -> tuple[argparse.Namespace, str | None, list[str]]:
        """(options, MODEL or None, overrides)"""
        options, unknown = self.parse_known_intermixed_args([_switch_as_key(word) for word in arguments])
        if unknown:
            split_flags([word for word in unknown if word.startswith("--")])  # raises, with the nearest name
            self.error(f"unknown flag {unknown[0]!r}; {self.prog} --help lists those there are")
        words = [word for word in options.words if "=" not in word] + [options.model] * (options.model is not None)
        if len(words) > 1:
            raise ConfigError(f"{words[1]!r}: one MODEL is enough, and {words[0]!r} is one; keys are set as key=value")
        assigned = [word for word in options.words if "=" in word]
        return options, next(iter(words), None), getattr(options, "overrides", []) + assigned


class _Override(argparse.Action):
    """Keeps a flag that stands for a recipe key as it was written."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        flag = next(word for word in self.option_strings if word.startswith("--"))
        written = [flag if option_string is None or not option_string.startswith("--") else option_string]
        if self.nargs != 0:
            written.append(values if isinstance(values, str) else json.dumps(values))
        namespace.overrides = [*getattr(namespace, "overrides", []), *written]


def _switch_as_key(word: str) -> str:
    """`--enforce-eager=true` as `enforce_eager=true`, because argparse allows no value for a switch; the flags of other
    keys with hyphens."""
    flag, equals, value = word.partition("=")
    if flag.startswith("--") and "_" in flag:
        return _switch_as_key(flag.replace("_", "-") + equals + value)
    name = flag.removeprefix("--").replace("-", "_")
    return f"{name}={value}" if equals and flag.startswith("--") and is_switch(name) else word


def _parse_generate(arguments: list[str]) -> Command:
    parser = _Parser("generate", "Complete prompts and stream what comes.")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="text to continue; repeatable")
    parser.add_argument("--chat", metavar="TEXT", action="append", default=[], help="message to answer; repeatable")
    parser.add_argument("--max-tokens", metavar="N", help="most tokens of each completion")
    parser.add_argument("--temperature", metavar="T", help="0 is greedy")
    parser.add_argument("--adapter", metavar="NAME", help="LoRA adapter to go through, one of lora.adapters")
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON lines")
    _add_dry_run(parser)
    options, model, overrides = parser.parse_command(arguments)
    _check_dry_run(options)
    settings = {
        "model.path": model,
        "generate.adapter": options.adapter,
        "generate.sampling.max_tokens": options.max_tokens,
        "generate.sampling.temperature": options.temperature,
        "generate.output": options.output,
    }
    return Command("generate", options, overrides + _assignments(settings))


def _parse_plan(arguments: list[str]) -> Command:
    return Command("plan", parse_plan(arguments), [])


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="read config.json only; print what a start on GPUs would do, and exit"
    )
    parser.add_argument("--gpu", metavar="NAME", help="GPU that --dry-run assumes, as h200; default: this machine's")


def _check_dry_run(options: argparse.Namespace) -> None:
    if options.gpu and not options.dry_run:
        raise ConfigError("--gpu is for --dry-run; a run takes the GPUs of the machine")


def _parse_bench(arguments: list[str]) -> Command:
    kind, *rest = arguments or [""]
    if kind == "serve":
        return Command("bench serve", parse_serve(rest), [])
    if kind == "replay":
        return Command("bench replay", parse_replay(rest), [])
    if kind == "compare":
        return _parse_compare(rest)
    if kind not in (*BENCHMARKS, "-h", "--help"):
        raise ConfigError(f"bench {kind or '(nothing)'}: choose from {', '.join(BENCHMARKS)}, serve, replay, compare")
    parser = _Parser(
        "bench latency|throughput|rollouts", "Compare modes on one checkpoint, in one run; medians over repeats."
    )
    number: dict[str, Any] = {"type": _positive, "metavar": "N"}
    rollouts = kind == "rollouts"
    modes = DEFAULT_MODES.get(kind, ["tp", "sp", "shift", "single"])
    others = ", ".join(mode for mode in MODES if mode not in modes)
    parser.add_argument("--modes", type=_modes, default=modes, help=f"default: {','.join(modes)}; also {others}")
    parser.add_argument("--input-len", **number, help="tokens of a prompt")
    parser.add_argument("--output-len", **number, help="tokens of a completion")
    parser.add_argument("--num-prompts", **number, help="prompts together")
    parser.add_argument("--samples", **number, help="completions per prompt")
    parser.add_argument(
        "--tail",
        type=_tail,
        default=1.0 if rollouts else 0.0,
        metavar="X",
        help="spread of completion lengths: standard deviation of their logarithm; 0: all are equal",
    )
    parser.add_argument("--repeats", **number, default=3, help="measurements of each mode")
    parser.add_argument(
        "--seconds",
        type=_seconds,
        metavar="N",
        help="time for all runs: where they would take longer here, by a short probe, there are fewer prompts, samples "
        f"and tokens ({ROLLOUTS_SECONDS:g} for rollouts whose sizes are not given)",
    )
    parser.add_argument("--json", metavar="FILE", help="write every measurement, after each")
    parser.add_argument(
        "--random-model", choices=RANDOM_MODELS, help="random weights instead of MODEL, made once and kept"
    )
    options, model, overrides = parser.parse_command(arguments if kind.startswith("-") else rest)
    options.kind = kind
    _fill_in_sizes(options)
    if options.random_model and model:
        raise ConfigError(f"MODEL {model!r} and --random-model {options.random_model!r}: give one of them")
    if options.random_model:
        model = options.random_model  # replaced by its folder once it is created
    return Command("bench", options, overrides + _assignments({"model.path": model}))


def _fill_in_sizes(options: argparse.Namespace) -> None:
    """The default workload, where none is given; only that of rollouts is fitted to a time without being asked to."""
    sizes = DEFAULT_SIZES[options.kind]
    missing = [name for name in sizes if getattr(options, name) is None]
    if options.kind == "rollouts" and len(missing) == len(sizes):
        options.seconds = options.seconds or ROLLOUTS_SECONDS
    for name in missing:
        setattr(options, name, sizes[name])


def _parse_compare(arguments: list[str]) -> Command:
    parser = _Parser("bench compare", "The same work under dp, tp, sp and shift on this machine: a report with plots.")
    add_options(parser)
    parser.add_argument("--random-model", choices=RANDOM_MODELS, help="random weights instead of MODEL, made and kept")
    options, model, overrides = parser.parse_command(arguments)
    if options.random_model and model:
        raise ConfigError(f"MODEL {model!r} and --random-model {options.random_model!r}: give one of them")
    check_options(options)
    return Command("bench compare", options, overrides + _assignments({"model.path": model}))


def _parse_serve(arguments: list[str]) -> Command:
    parser = _Parser("serve", "Answer HTTP requests in OpenAI's format, until a signal ends it.")
    parser.add_argument("--host", metavar="ADDRESS", help="address to listen on; 0.0.0.0 for all of the machine's")
    parser.add_argument("--port", metavar="N", help="port to listen on; 0: any free one")
    parser.add_argument("--api-key", metavar="KEY", help="key that clients must send")
    parser.add_argument("--admin-api-key", metavar="KEY", help="key for the administrative routes")
    parser.add_argument("--served-model-name", metavar="NAME", help="model name that clients use")
    parser.add_argument("--ray", action="store_true", help="run the replicas on a Ray cluster (docs/deployment.md)")
    _add_dry_run(parser)
    options, model, overrides = parser.parse_command(arguments)
    _check_dry_run(options)
    names = ("host", "port", "api_key", "admin_api_key", "served_model_name")
    settings = {"model.path": model, **{f"server.{name}": getattr(options, name) for name in names}}
    return Command("serve", options, overrides + _assignments(settings))


def _parse_calibrate(arguments: list[str]) -> Command:
    parser = _Parser("calibrate", "Measure how long steps take in every mode, for policy adaptive.")
    parser.add_argument("--seconds", type=_seconds, metavar="N", default=120.0, help="longest time to take (120)")
    parser.add_argument("--output", metavar="FILE", help="where to write the profile; default: the user's cache")
    options, model, overrides = parser.parse_command(arguments)
    return Command("calibrate", options, overrides + _assignments({"model.path": model}))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _assignments(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


def _given_prompts(options: argparse.Namespace) -> list[Any]:
    chats = [{"messages": [{"role": "user", "content": text}]} for text in options.chat]
    return [*options.prompt, *chats]


def _with_prompts(generate: Any, prompts: list[Any]) -> Any:
    """Prompts from the command line replace the recipe's prompts and schedule."""
    sampling = {"max_tokens": DEFAULT_MAX_TOKENS, **generate.sampling}
    return dataclasses.replace(generate, prompts=prompts, schedule=None, sampling=sampling)


def _tail(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 3")
    return number


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _modes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in MODES:
            raise argparse.ArgumentTypeError(f"{name!r} is not a mode; choose from {', '.join(MODES)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a mode twice")
    return names
