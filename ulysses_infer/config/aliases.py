"""Aliases of recipe keys that users know from DeepSpeed and vLLM.

DeepSpeed: the keys of `deepspeed.init_inference(model, config)`. vLLM: its engine arguments and the flags of its Shift
Parallelism plug-in, such as `--tensor-parallel-size 2` on a command line or `tensor_parallel_size=2` in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ulysses_infer.config.foreign import FOREIGN
from ulysses_infer.config.keys import all_keys, nearest_name
from ulysses_infer.errors import ConfigError


def shift_policy(value: Any) -> str:
    """The policy that `enable_shift_parallel: value` selects."""
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"must be true or false, not {value!r}")
    return "threshold" if str(value).lower() == "true" else "static"


def expert_placement(value: Any) -> str:
    """The placement that `enable_expert_parallel: value` selects."""
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"must be true or false, not {value!r}")
    return "expert" if str(value).lower() == "true" else "auto"


def backend_name(value: Any) -> Any:
    """An attention backend in our spelling: vLLM's `FLASH_ATTN` is `flash_attn`, `TORCH_SDPA` is `torch`."""
    if not isinstance(value, str):
        return value
    return BACKEND_NAMES.get(value.upper(), value.lower())


def parser_name(value: Any) -> Any:
    """A parser of tool calls in our spelling."""
    return PARSER_NAMES.get(value, value) if isinstance(value, str) else value


def generation_config_name(value: Any) -> Any:
    """The source of sampling defaults in our spelling: vLLM's `vllm` is `none`."""
    return "none" if value == "vllm" else value


def only_one(value: Any) -> Any:
    """The value, or the only one of a list; vLLM takes several names and keys."""
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise ConfigError(f"{value!r:.80}: several values are not supported here; give one")
        return value[0]
    return value


def adapters(value: Any) -> dict[str, Any]:
    """The adapters of `lora_modules`: `name=path`, `{"name": ..., "path": ...}`, a mapping, or a list of those."""
    found: dict[str, Any] = {}
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, str) and item.partition("=")[1]:
            name, _, path = item.partition("=")
            found[name] = path
        elif isinstance(item, Mapping) and {"name", "path"} <= set(item):
            found[str(item["name"])] = item["path"]
        elif isinstance(item, Mapping):
            found |= {str(name): path for name, path in item.items()}
        else:
            raise ConfigError(f"{item!r:.80} is not an adapter; give name=path, as in lora.adapters.NAME=PATH")
    return found


SWITCHES = (shift_policy, expert_placement)


@dataclass(frozen=True)
class Alias:
    """The key that an alias sets, and how its value is converted."""

    target: str
    translate: Callable[[Any], Any] | None = None

    @property
    def is_switch(self) -> bool:
        """Whether its flag needs no value on the command line."""
        return self.translate in SWITCHES or all_keys()[self.target].type is bool


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
    "generation_config": Alias("model.generation_config", generation_config_name),
    "override_generation_config": Alias("model.override_generation_config"),
    "gpu_memory_utilization": Alias("cache.memory_utilization"),
    "kv_cache_dtype": Alias("cache.dtype"),
    "block_size": Alias("cache.block_size"),
    "enable_prefix_caching": Alias("cache.enable_prefix_caching"),
    "max_num_seqs": Alias("scheduler.max_num_seqs"),
    "max_num_batched_tokens": Alias("scheduler.max_num_batched_tokens"),
    "enable_chunked_prefill": Alias("scheduler.enable_chunked_prefill"),
    "enforce_eager": Alias("runtime.enforce_eager"),
    "device": Alias("runtime.device"),
    "attention_backend": Alias("runtime.attention_backend", backend_name),
    "async_scheduling": Alias("scheduler.async_scheduling"),
    "scheduling_policy": Alias("scheduler.policy"),
    "enable_expert_parallel": Alias("parallel.expert_placement", expert_placement),
    "logprobs_mode": Alias("runtime.logprobs_mode"),
    "lora_modules": Alias("lora.adapters", adapters),
    "num_gpu_blocks_override": Alias("cache.num_blocks"),
    "kv_cache_memory_bytes": Alias("cache.memory_bytes"),
    "hf_config_path": Alias("model.hf_config"),
    # vLLM server arguments
    "host": Alias("server.host"),
    "port": Alias("server.port"),
    "api_key": Alias("server.api_key", only_one),
    "served_model_name": Alias("server.served_model_name", only_one),
    "tool_call_parser": Alias("server.tool_call_parser", parser_name),
    "chat_template": Alias("server.chat_template"),
    "trust_request_chat_template": Alias("server.trust_request_chat_template"),
    "enable_tokenizer_info_endpoint": Alias("server.tokenizer_info"),
    "allowed_origins": Alias("server.cors_origins"),
    "ssl_certfile": Alias("server.ssl_certfile"),
    "ssl_keyfile": Alias("server.ssl_keyfile"),
    "enable_log_requests": Alias("server.access_log"),
}

BACKEND_NAMES = {"TORCH_SDPA": "torch", "TRITON_ATTN": "triton"}
PARSER_NAMES = {
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "qwen3_xml": "qwen3_coder",
    "deepseek_v3": "deepseek",
}

DTYPE_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}


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
    if name != positive and is_switch(positive) and not equals:
        return positive, "false"
    if "." in name or (name not in ALIASES and name not in FOREIGN):
        raise ConfigError(f"unknown flag {written!r}; {_flag_hint(written)}")
    if equals:
        return name, text
    if is_switch(name):
        return name, "true"
    if not remaining or remaining[0].startswith("--"):
        raise ConfigError(f"flag {written!r} needs a value")
    return name, remaining.pop(0)


def flag_names() -> list[str]:
    """The aliases and foreign arguments that are flags on a command line, without their dashes."""
    return [name for name in (*ALIASES, *FOREIGN) if "." not in name]


def is_switch(name: str) -> bool:
    """Whether the flag of an alias or foreign argument needs no value."""
    return (name in ALIASES and ALIASES[name].is_switch) or (name in FOREIGN and FOREIGN[name].is_switch)


def _flag_hint(written: str) -> str:
    flags = ["--" + name.replace("_", "-") for name in flag_names()]
    nearest = nearest_name(written.replace("_", "-"), flags)
    return f"did you mean {nearest!r}?" if nearest else "any key can be set with key=value, as in parallel.sp=4"
