"""Arguments of vLLM and DeepSpeed that have no key here: accepted with one log line if they change nothing, else
refused with one line that says why."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from ulysses_infer.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Foreign:
    """An argument without a key."""

    reason: str
    harmless: tuple[Any, ...] | None = ()
    """Values besides null that change nothing; None: all."""
    is_switch: bool = False
    """Whether its flag needs no value on the command line."""


def _no_effect(reason: str, is_switch: bool = False) -> Foreign:
    return Foreign(reason, None, is_switch)


def _none(reason: str, *harmless: Any) -> Foreign:
    return Foreign(f"there is no such setting here; {reason}", harmless, any(value is False for value in harmless))


_ADAPTERS = "all of lora.adapters are loaded at start, and lora.runtime_bytes is the room for others"
_SPECULATION = "use speculation.method, speculation.model and speculation.num_tokens"
_GRAPHS = "steps are captured as graphs where possible (runtime.enforce_eager)"

FOREIGN: dict[str, Foreign] = {
    # vLLM, without effect here
    "disable_log_requests": _no_effect("requests are only logged with server.access_log=true", True),
    "disable_log_stats": _no_effect("server.log_interval sets how often the load is logged", True),
    "uvicorn_log_level": _no_effect("runtime.log_level sets what is logged"),
    "enable_auto_tool_choice": _no_effect("tool calls are parsed as server.tool_call_parser says", True),
    "enable_prompt_tokens_details": _no_effect("usage always has them", True),
    "chat_template_content_format": _no_effect("the form that the template reads is detected"),
    "max_logprobs": _no_effect("requests over HTTP get at most 20, those in Python any number"),
    "enable_lora": _no_effect(_ADAPTERS, True),
    "max_loras": _no_effect(_ADAPTERS),
    "max_cpu_loras": _no_effect(_ADAPTERS),
    "max_lora_rank": _no_effect(_ADAPTERS + ", whatever their rank"),
    "swap_space": _no_effect("preempted requests are computed again, not swapped"),
    "compilation_config": _no_effect(_GRAPHS),
    "max_seq_len_to_capture": _no_effect(_GRAPHS),
    "disable_custom_all_reduce": _no_effect("runtime.collectives chooses them", True),
    "max_parallel_loading_workers": _no_effect("every rank reads its own part of the weights"),
    "limit_mm_per_prompt": _no_effect("models read only text"),
    "mm_processor_kwargs": _no_effect("models read only text"),
    "enable_sleep_mode": _no_effect("sleep() is always available", True),
    "disable_cascade_attn": _no_effect("there is none", True),
    "use_tqdm_on_load": _no_effect("progress is shown on terminals"),
    # vLLM, without a counterpart
    "distributed_executor_backend": _none("ranks are processes, start them with a launcher", "mp", "uni"),
    "load_format": _none("the format of the weights is detected, leave it out", "auto", "hf", "safetensors"),
    "config_format": _none("leave it out", "auto", "hf"),
    "tokenizer_mode": _none("model.tokenizer chooses the tokenizer", "auto", "hf"),
    "tokenizer_revision": _none("model.revision applies to the tokenizer too"),
    "skip_tokenizer_init": _none("a checkpoint without a tokenizer takes token ids", False),
    "download_dir": _none("set the environment variable HF_HOME"),
    "quantization": _none("the quantization of the checkpoint is detected, leave it out"),
    "task": _none("models only generate", "auto", "generate"),
    "runner": _none("models only generate", "auto", "generate"),
    "pipeline_parallel_size": _none("use parallel.sp and parallel.tp", 1),
    "cpu_offload_gb": _none("weights stay on the device; raise parallel.tp", 0),
    "kv_offloading_size": _none("use cache.offload_host_bytes, in bytes per rank"),
    "kv_offloading_backend": _none("use cache.offload_host_bytes and cache.offload_disk_bytes", "native"),
    "speculative_config": _none(_SPECULATION),
    "speculative_model": _none(_SPECULATION),
    "num_speculative_tokens": _none(_SPECULATION, 0),
    "reasoning_parser": _none("reasoning is part of the content, leave it out", ""),
    "enable_reasoning": _none("reasoning is part of the content, leave it out", False),
    "guided_decoding_backend": _none("structured outputs use llguidance, leave it out", "auto", "guidance"),
    "structured_outputs_config": _none("structured outputs use llguidance, leave it out"),
    "kv_transfer_config": _none("caches are not transferred"),
    "num_scheduler_steps": _none("use scheduler.async_scheduling", 1),
    "disable_sliding_window": _none("model.max_model_len limits the length", False),
    "logits_processors": _none("use logit_bias, bad_words or structured_outputs in requests"),
    "response_role": _none("responses have the role assistant", "assistant"),
    "root_path": _none("let the proxy remove the prefix", ""),
    # deepspeed.init_inference
    "replace_with_kernel_inject": _no_effect("the engine always replaces layers", True),
    "replace_method": _no_effect("the engine always replaces layers"),
    "injection_policy": _none("layers are recognised, leave it out"),
    "checkpoint": _none("give the checkpoint as the model"),
    "quant": _none("the quantization of the checkpoint is detected, leave it out"),
}


def settle(name: str, value: Any, origin: str) -> None:
    """Log that an argument has no effect, on the first rank only. Raises `ConfigError` if it would have one."""
    foreign = FOREIGN[name]
    if value is None:
        return
    if foreign.harmless is not None and value not in foreign.harmless:
        raise ConfigError(f"{name} = {value!r} (in {origin}): {foreign.reason}")
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s (in %s) has no effect: %s", name, origin, foreign.reason)
