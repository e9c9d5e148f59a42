"""The command line: what is understood, what is refused, and how the launcher is started."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from tests.launcher import run, ulysses_infer
from ulysses_infer.cli import main as cli
from ulysses_infer.cli.arguments import DEFAULT_MAX_TOKENS, parse
from ulysses_infer.config import Config, ModelConfig, ParallelConfig, RuntimeConfig
from ulysses_infer.errors import ConfigError

TWO_RANKS = Config(model=ModelConfig(path="m"), parallel=ParallelConfig(sp=2), runtime=RuntimeConfig(device="cpu"))


def test_model_prompt_and_keys_may_stand_in_any_order() -> None:
    config = parse(["generate", "parallel.sp=2", "--prompt", "a=b", "models/demo", "--temperature", "0"]).config()

    assert config.model.path.endswith("models/demo")
    assert config.parallel.sp == 2
    assert config.generate.prompts == ["a=b"]
    assert config.generate.sampling == {"max_tokens": DEFAULT_MAX_TOKENS, "temperature": 0}


def test_prompts_given_replace_those_of_the_recipe_and_their_schedule() -> None:
    config = parse(["generate", "--config", "recipes/demo.yaml", "--prompt", "x", "--chat", "y"]).config()

    assert config.generate.prompts == ["x", {"messages": [{"role": "user", "content": "y"}]}]
    assert config.generate.schedule is None
    assert config.generate.sampling["max_tokens"] == 64  # the recipe's


def test_flags_of_vllm_and_its_plugin_are_understood() -> None:
    flags = ["--ulysses-sequence-parallel-size", "2", "--no-enable-prefix-caching", "--enable-shift-parallel=true"]
    config = parse(["generate", "m", "--prompt", "x", *flags]).config()

    assert config.parallel.sp == 2
    assert not config.cache.enable_prefix_caching
    assert config.policy.name == "threshold"


def test_arguments_of_vllms_server_are_understood() -> None:
    flags = ["-tp", "2", "--lora-modules", "a=org/x", "b=org/y", "--served-model-name", "n", "--api-key", "k"]
    config = parse(["serve", "--model", "m", *flags, "--enable_expert_parallel", "--max_num_seqs=7"]).config()

    assert (config.model.path, config.parallel.tp) == ("m", 2)
    assert config.lora.adapters == {"a": "org/x", "b": "org/y"}
    assert (config.server.served_model_name, config.server.api_key) == ("n", "k")
    assert (config.parallel.expert_placement, config.scheduler.max_num_seqs) == ("expert", 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "m", "--speculative-config", '{"method": "ngram"}'], "use speculation.method"),
        (["generate", "m"], "nothing to generate"),
        (["generate", "m", "n", "--prompt", "x"], "one MODEL is enough"),
        (["generate", "m", "--tensr-parallel-size", "2"], "did you mean '--tensor-parallel-size'?"),
        (["generate", "m", "--prompt"], "expected one argument"),
        (["generate", "m", "-x"], "unknown flag '-x'"),
        (["generate", "m", "--prompt", "x", "paralel.sp=2"], "did you mean 'parallel.sp'?"),
        (["bench"], "choose from latency, throughput"),
        (["bench", "latency", "m", "--modes", "tp,pp"], "'pp' is not a mode"),
        (["bench", "latency", "m", "--modes", "tp,tp"], "twice"),
        (["bench", "latency", "m", "--repeats", "0"], "at least 1"),
        (["bench", "latency", "m", "--random-model", "llama-60m"], "give one of them"),
        (["generte"], "unknown command 'generte'"),
    ],
)
def test_senseless_command_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as raised:
        parse(arguments).config()
    assert words in str(raised.value)


def test_launcher_gets_the_number_of_ranks_and_unchanged_arguments() -> None:
    command = cli.launcher_command(["generate", "m", "--prompt", "two words"], 4)

    assert command[command.index("--num_gpus") + 1] == "4"
    assert command[-4:] == ["generate", "m", "--prompt", "two words"]
    assert command[-5] == str(cli.LAUNCH)


def test_ranks_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cli.os, "sched_getaffinity", lambda pid: set(range(8)))

    assert cli.launcher_variables(TWO_RANKS, 2) == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4"}


def test_requested_threads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dataclasses.replace(TWO_RANKS, runtime=RuntimeConfig(device="cpu", threads_per_rank=3))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cli.launcher_variables(asked, 2)["OMP_NUM_THREADS"] == "3"

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in cli.launcher_variables(asked, 2)


def test_too_few_gpus_are_reported_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)

    with pytest.raises(ConfigError, match="2 ranks need 2 GPUs, but this machine has 1"):
        cli.launcher_variables(dataclasses.replace(TWO_RANKS, runtime=RuntimeConfig()), 2)


def test_error_is_reported_without_starting_the_launcher() -> None:
    result = run(ulysses_infer("generate", "models/demo", "--prompt", "x", "parallel.sp=two"), timeout=30)

    assert result.returncode == 2
    assert result.stderr.startswith("error: parallel.sp = 'two'")
    assert result.stderr.count("\n") == 1


def test_version_and_help_need_no_heavy_import() -> None:
    code = "import sys; from ulysses_infer.cli.main import main\nsys.argv[1:] = ['{}']\ntry: main()\nfinally: {}"
    for word in ("--version", "--help"):
        check = "assert 'torch' not in sys.modules"
        result = subprocess.run(
            [sys.executable, "-c", code.format(word, check)], capture_output=True, text=True, check=True
        )
        assert "ulysses-infer" in result.stdout


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("fastapi", ["serve", "m", "parallel.sp=2"], "serve"),
        ("msgspec", ["serve", "m"], "serve"),
        ("httptools", ["bench", "serve", "--model", "m"], "bench"),
        ("httptools", ["bench", "replay", "trace.csv"], "bench"),
        ("matplotlib", ["bench", "compare", "m"], "bench"),
        ("fastapi", ["bench", "compare", "m"], "serve"),
    ],
)
def test_missing_extra_is_reported_in_one_line_with_the_pip_command(
    module: str, arguments: list[str], extra: str
) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from ulysses_infer.cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)

    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert module in result.stderr
    assert result.stderr.endswith(f'pip install "ulysses_infer[{extra}]"\n')
    assert result.stderr.count("\n") == 1
