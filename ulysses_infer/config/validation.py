"""Checks of a whole configuration: ranges, contradictions, unavailable features."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

from ulysses_infer.config.keys import Key, all_keys
from ulysses_infer.config.schema import Config
from ulysses_infer.config.settings import Setting
from ulysses_infer.config.speculation import AUTO, DRAFT_MODEL, EAGLE3
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.parallel.layout import Mode, check_mode
from ulysses_infer.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

GROUP_SIZES = (32, 64, 128)
"""Of `model.quantize_group_size`: whole words of eight values, and whole segments of quantised activations."""
PROMPT_KEYS = ("prompt", "messages", "sampling")
POLICY_KEYS = {
    "mode": "static",
    "threshold_tokens": "threshold",
    "profile": "adaptive",
    "calibration_seconds": "adaptive",
    "target_tpot_ms": "adaptive",
    "target_ttft_ms": "adaptive",
    "exploration": "adaptive",
}
"""Settings of a single policy, with its name."""


def validate(config: Config, explicit: Mapping[str, Setting]) -> None:
    """Raise ConfigError for the first value that is wrong by itself or in combination with another.

    explicit: the settings given by the user, by key; messages name their origin.
    """
    for key in all_keys().values():
        _check_value(_given(config, key.name, explicit), key)
    _check_modes(config, explicit)
    _check_policy(config, explicit)
    _check_generate(config, explicit)
    _check_adapters(config)
    _check_snapshots(config, explicit)
    _check_offload(config, explicit)
    _check_speculation(config, explicit)
    _check_quantize(config, explicit)


def _check_quantize(config: Config, explicit: Mapping[str, Setting]) -> None:
    setting = _given(config, "model.quantize_group_size", explicit)
    if setting.value not in GROUP_SIZES:
        nearest = min(GROUP_SIZES, key=lambda size: abs(size - setting.value))
        raise setting.complain(f"choose from {', '.join(map(str, GROUP_SIZES))}; the nearest is {nearest}")


def _check_speculation(config: Config, explicit: Mapping[str, Setting]) -> None:
    speculation, most = config.speculation, config.scheduler.max_num_batched_tokens
    count = _given(config, "speculation.num_tokens", explicit)
    if count.value != AUTO and (type(count.value) is not int or count.value < 1):
        raise count.complain("give auto, or a number of at least 1; to switch speculation off, use method: none")
    if count.value != AUTO and most is not None and count.value >= most:
        raise count.complain(f"must be less than scheduler.max_num_batched_tokens = {most}, the limit of a step")
    if speculation.method == DRAFT_MODEL and speculation.model is None:
        raise ConfigError(
            "speculation.method = 'draft_model' needs a model: give speculation.model, a smaller checkpoint with the "
            "same vocabulary"
        )
    if speculation.method == EAGLE3 and speculation.model is None:
        raise ConfigError(
            "speculation.method = 'eagle3' needs a head: give speculation.model, an EAGLE-3 checkpoint that was "
            "trained for the served model"
        )
    if speculation.min_match > speculation.max_match:
        raise _given(config, "speculation.min_match", explicit).complain(
            f"must be at most speculation.max_match = {speculation.max_match}"
        )


def _check_snapshots(config: Config, explicit: Mapping[str, Setting]) -> None:
    cache = config.cache
    if cache.state_snapshots and not cache.enable_prefix_caching:
        raise _given(config, "cache.state_snapshots", explicit).complain(
            "snapshots serve prefix caching, but cache.enable_prefix_caching is false; use null"
        )
    if (cache.state_snapshot_interval or 0) % cache.block_size:
        raise _given(config, "cache.state_snapshot_interval", explicit).complain(
            f"must be a multiple of cache.block_size = {cache.block_size}"
        )


def _check_offload(config: Config, explicit: Mapping[str, Setting]) -> None:
    cache = config.cache
    for name in ("offload_host_bytes", "offload_disk_bytes"):
        if getattr(cache, name) and not cache.enable_prefix_caching:
            raise _given(config, f"cache.{name}", explicit).complain(
                "it keeps blocks of cached prefixes, but cache.enable_prefix_caching is false; use 0"
            )
    if cache.offload_disk_bytes and not cache.offload_host_bytes:
        raise _given(config, "cache.offload_disk_bytes", explicit).complain(
            "blocks come from host memory, but cache.offload_host_bytes is 0; set it too"
        )
    if cache.offload_disk_bytes and cache.offload_disk_folder is None:
        raise _given(config, "cache.offload_disk_bytes", explicit).complain(
            "give cache.offload_disk_folder, a folder on a fast local disk"
        )


def _check_adapters(config: Config) -> None:
    names, wanted = config.lora.adapters, config.generate.adapter
    if config.lora.is_used and config.cache.latent:
        raise ConfigError(
            "cache.latent = true: adapters may change kv_b_proj, which the latent cache bypasses; use null"
        )
    if wanted is not None and wanted not in names:
        raise ConfigError(f"generate.adapter = {wanted!r} is not one of lora.adapters ({', '.join(names) or 'empty'})")
    if config.served_model_name in names:
        raise ConfigError(
            f"lora.adapters has {config.served_model_name!r}, which is the model's own name; rename the adapter, or "
            "set server.served_model_name"
        )
    default, choices = config.server.default_model, [config.served_model_name, *names]
    if default is not None and default not in choices:
        raise ConfigError(f"server.default_model = {default!r} is not one of the served names ({', '.join(choices)})")


def refuse_unavailable(config: Config) -> None:
    """Raise ConfigError for a setting that only `serve` supports."""
    if config.parallel.dp > 1:
        raise ConfigError(f"parallel.dp = {config.parallel.dp}: replicas need the router of serve; use 1 here")


def warn_ignored(config: Config, explicit: Mapping[str, Setting]) -> None:
    """Warn, on the first rank only, about given settings that another setting makes ineffective."""
    if os.environ.get("RANK", "0") != "0":
        return
    for name, reason in _ignored(config):
        if name in explicit:
            logger.warning("%s (in %s) is ignored: %s", name, explicit[name].origin, reason)


def _ignored(config: Config) -> list[tuple[str, str]]:
    """(key, reason) of every setting without effect in `config`."""
    policy, cache = config.policy, config.cache
    ignored = []
    for name, owner in POLICY_KEYS.items():
        if policy.name != owner:
            ignored.append((f"policy.{name}", f"policy.name is {policy.name}, not {owner}"))
    if policy.name == "adaptive" and policy.target_tpot_ms is None:
        ignored.append(("policy.target_ttft_ms", "it has no effect without policy.target_tpot_ms"))
    if not config.speculation.is_enabled:
        names = (key.name for key in all_keys().values() if key.name.startswith("speculation."))
        ignored += [(name, "speculation.method is none") for name in names if name != "speculation.method"]
    elif config.speculation.method != DRAFT_MODEL:
        reason = f"speculation.method is {config.speculation.method}"
        unused = ["draft_ranks", "quantize"] + ([] if config.speculation.method == EAGLE3 else ["model"])
        ignored += [(f"speculation.{name}", reason) for name in unused]
    if cache.num_blocks is not None:
        ignored.append(("cache.memory_bytes", "cache.num_blocks sets the size of the cache"))
    if not cache.offload_disk_bytes:
        ignored.append(("cache.offload_disk_folder", "cache.offload_disk_bytes is 0"))
    most = config.scheduler.max_num_batched_tokens
    if most is not None and config.scheduler.max_num_seqs > most:
        reason = "each request of a step has at least one token of scheduler.max_num_batched_tokens"
        ignored.append(("scheduler.max_num_seqs", f"{reason} = {most}"))
    return ignored


def _given(config: Config, name: str, explicit: Mapping[str, Setting]) -> Setting:
    """The resolved value of a key, with the origin if the user gave it."""
    section, _, last = name.partition(".")
    value = getattr(getattr(config, section), last)
    written = explicit.get(name, Setting(name, value, "the defaults", name))
    return dataclasses.replace(written, value=value)


def _check_value(setting: Setting, key: Key) -> None:
    """Raise ConfigError unless a key's value is one of its choices and within its range."""
    if setting.value is None:
        return
    limits = key.field.metadata
    choices, at_least, above, at_most = (limits[name] for name in ("choices", "at_least", "above", "at_most"))
    if choices and setting.value not in choices:
        raise setting.complain(f"choose from {', '.join(choices)}")
    if at_least is not None and not setting.value >= at_least:
        raise setting.complain(f"must be at least {at_least}")
    if above is not None and not setting.value > above:
        raise setting.complain(f"must be more than {above}")
    if at_most is not None and not setting.value <= at_most:
        raise setting.complain(f"must be at most {at_most}")


def _check_modes(config: Config, explicit: Mapping[str, Setting]) -> None:
    setting = _given(config, "parallel.modes", explicit)
    for pair in setting.value or []:
        if not _is_pair(pair):
            raise setting.complain("each mode is [sp, tp], two numbers of at least 1")
        _check_mode(setting, config, Mode(*pair))


def _check_policy(config: Config, explicit: Mapping[str, Setting]) -> None:
    parallel, policy = config.parallel, config.policy
    shift = parallel.layout.shift
    if policy.name == "threshold" and shift not in parallel.available_modes:
        setting = _given(config, "parallel.modes", explicit)
        raise setting.complain(f"policy threshold shifts to [{shift.sp}, {shift.tp}]; list it or set it to null")
    if policy.name == "adaptive" and policy.target_tpot_ms and not config.scheduler.enable_chunked_prefill:
        setting = _given(config, "policy.target_tpot_ms", explicit)
        raise setting.complain("it needs chunked prefill; set scheduler.enable_chunked_prefill to true")
    setting = _given(config, "policy.mode", explicit)
    if policy.name != "static" or policy.mode in (None, "sp"):
        return
    if policy.mode != "tp" and not _is_pair(policy.mode):
        raise setting.complain("give sp, tp or [sp, tp]")
    mode = shift if policy.mode == "tp" else Mode(*policy.mode)
    _check_mode(setting, config, mode)
    if mode not in parallel.available_modes:
        raise setting.complain(f"mode [{mode.sp}, {mode.tp}] is not available; add it to parallel.modes")


def _check_mode(setting: Setting, config: Config, mode: Mode) -> None:
    try:
        check_mode(config.parallel.layout, mode)
    except ConfigError as error:
        raise setting.complain(str(error)) from error


def _is_pair(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and len(value) == 2
    return numbers and all(type(number) is int and number >= 1 for number in value)


def _check_generate(config: Config, explicit: Mapping[str, Setting]) -> None:
    generate = config.generate
    _check_sampling(generate.sampling, "generate.sampling")
    _check_schedule(_given(config, "generate.schedule", explicit), len(generate.prompts))
    for index, item in enumerate(generate.prompts):
        _check_prompt(item, generate.sampling, f"generate.prompts[{index}]")


def _check_schedule(setting: Setting, num_prompts: int) -> None:
    if setting.value is None:
        return
    if not all(type(step) is int and step >= 0 for step in setting.value):
        raise setting.complain("each must be a step number of at least 0")
    if len(setting.value) != num_prompts:
        raise setting.complain(f"give one step for each of the {num_prompts} prompts")


def _check_prompt(item: Any, sampling: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError unless `item` is a text or a mapping with `prompt` or `messages`."""
    if isinstance(item, str):
        return
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where} = {item!r}: expected a text, or a mapping with {', '.join(PROMPT_KEYS)}")
    for name in item:
        if name not in PROMPT_KEYS:
            raise ConfigError(f"unknown key '{name}' in {where}; known: {', '.join(PROMPT_KEYS)}")
    if ("prompt" in item) == ("messages" in item):
        raise ConfigError(f"{where}: give either prompt or messages")
    if "prompt" in item and not isinstance(item["prompt"], str):
        raise ConfigError(f"{where}.prompt = {item['prompt']!r}: expected a text")
    if "messages" in item and not _are_messages(item["messages"]):
        raise ConfigError(f"{where}.messages: expected a list of mappings with role and content")
    own = item.get("sampling", {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"{where}.sampling = {own!r}: expected a mapping of sampling parameters")
    _check_sampling({**sampling, **own}, f"{where}.sampling")


def _are_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in value)


def _check_sampling(sampling: Mapping[str, Any], where: str) -> None:
    try:
        SamplingParams.from_mapping(sampling)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from error
