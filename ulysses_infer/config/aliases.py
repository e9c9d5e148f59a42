"""Aliases of recipe keys that users know from DeepSpeed and vLLM.

DeepSpeed: the keys of `deepspeed.init_inference(model, config)`. vLLM: its engine arguments and the flags of its Shift
Parallelism plug-in, such as `--tensor-parallel-size 2` on a command line or `tensor_parallel_size=2` in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ulysses_infer.config.keys import all_keys, nearest_name
from ulysses_infer.errors import ConfigError


def shift_policy(value: Any) -> str:
    """The policy that `enable_shift_parallel: value` selects."""
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"enable_shift_parallel must be true or false, not {value!r}")
    return "threshold" if str(value).lower() == "true" else "static"


@dataclass(frozen=True)
class Alias:
    """The key that an alias sets, and how its value is converted."""

    target: str
    translate: Callable[[Any], Any] | None = None

    @property
    def is_switch(self) -> bool:
        """Whether its flag needs no value on the command line."""
        return self.translate is shift_policy or all_keys()[self.target].type is bool


ALIASES: dict[str, Alias] = {
    # deepspeed.init_inference
    "dtype": Alias("model.dtype"),
    "tensor_parallel.tp_size": Alias("parallel.tp"),
    "tp.tp_size": Alias("parallel.tp"),
    "mp_size": Alias("parallel.tp"),
    "max_out_tokens": Alias("model.max_model_len"),
    # the vLLM plug-in of the Shift Parallelism paper
    "tensor_parallel_size": Alias("parallel.tp"),
    "ulysses_sequence_parallel_size": Alias("parallel.sp"),
    "enable_shift_parallel": Alias("policy.name", shift_policy),
    "shift_parallel_threshold": Alias("policy.threshold_tokens"),
    # vLLM engine arguments
    "data_parallel_size": Alias("parallel.dp"),
    "tokenizer": Alias("model.tokenizer"),
    "revision": Alias("model.revision"),
    "seed": Alias("model.seed"),
    "trust_remote_code": Alias("model.trust_remote_code"),
    "max_model_len": Alias("model.max_model_len"),
    "hf_overrides": Alias("model.hf_overrides"),
    "generation_config": Alias("model.generation_config"),
    "override_generation_config": Alias("model.override_generation_config"),
    "gpu_memory_utilization": Alias("cache.memory_utilization"),
    "kv_cache_dtype": Alias("cache.dtype"),
    "block_size": Alias("cache.block_size"),
    "enable_prefix_caching": Alias("cache.enable_prefix_caching"),
    "max_num_seqs": Alias("scheduler.max_num_seqs"),
    "max_num_batched_tokens": Alias("scheduler.max_num_batched_tokens"),
    "enable_chunked_prefill": Alias("scheduler.enable_chunked_prefill"),
    "enforce_eager": Alias("runtime.enforce_eager"),
}

DTYPE_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}

NEEDLESS_KEYS = frozenset({"replace_with_kernel_inject", "replace_method", "injection_policy", "checkpoint"})
"""DeepSpeed keys for what this engine always does or detects itself."""


def is_alias_section(name: str) -> bool:
    """Whether `name` is a mapping of aliases, such as DeepSpeed's `tensor_parallel: {tp_size: 2}`."""
    return any(alias.startswith(name + ".") for alias in ALIASES)


def dtype_name(value: Any) -> Any:
    """A dtype in the schema's spelling: `torch.float16`, `fp16` and `half` are `float16`."""
    if not isinstance(value, str) and type(value).__name__ != "dtype":
        return value
    name = str(value).removeprefix("torch.")
    return DTYPE_NAMES.get(name, name)


def split_flags(arguments: list[str]) -> list[tuple[str, str]]:
    """Command-line overrides as (key or alias, text of the value) pairs, in order.

    Takes `a.b=c`, `--flag value`, `--flag=value`, `--switch` and `--no-switch`; others raise ConfigError.
    """
    remaining = list(arguments)
    pairs = []
    while remaining:
        argument = remaining.pop(0)
        pairs.append(_flag(argument, remaining) if argument.startswith("--") else _assignment(argument))
    return pairs


def _assignment(argument: str) -> tuple[str, str]:
    name, equals, text = argument.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {argument!r} is not of the form key=value, as in parallel.sp=4")
    return name, text


def _flag(argument: str, remaining: list[str]) -> tuple[str, str]:
    """The (alias, text) pair of one flag; a separate value is removed from the front of `remaining`."""
    written, equals, text = argument.partition("=")
    name = written.removeprefix("--").replace("-", "_")
    positive = name.removeprefix("no_")
    if name != positive and positive in ALIASES and ALIASES[positive].is_switch and not equals:
        return positive, "false"
    if name not in ALIASES or "." in name:
        raise ConfigError(f"unknown flag {written!r}; {_flag_hint(written)}")
    if equals:
        return name, text
    if ALIASES[name].is_switch:
        return name, "true"
    if not remaining or remaining[0].startswith("--"):
        raise ConfigError(f"flag {written!r} needs a value")
    return name, remaining.pop(0)


def _flag_hint(written: str) -> str:
    flags = ["--" + name.replace("_", "-") for name in ALIASES if "." not in name]
    nearest = nearest_name(written.replace("_", "-"), flags)
    return f"did you mean {nearest!r}?" if nearest else "any key can be set with key=value, as in parallel.sp=4"
