"""Writes the recipe of a planned layout, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ulysses_infer.config import CacheConfig, Config
from ulysses_infer.errors import ConfigError, first_line
from ulysses_infer.planning.planner import Candidate, Plan


def recipe_of(plan: Plan, config: Config, model: str) -> dict[str, Any]:
    """The recipe of the best candidate."""
    candidate = plan.best.candidate
    layout, scheduler = candidate.layout, config.scheduler
    recipe: dict[str, Any] = {
        "model": {"path": model},
        "parallel": {"sp": layout.base.sp, "tp": layout.base.tp, "dp": layout.dp},
        "policy": _policy(candidate, plan),
        "scheduler": {
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        },
    }
    if plan.speculation is not None:
        speculation = plan.speculation.config
        recipe["speculation"] = {"method": speculation.method, "num_tokens": speculation.num_tokens}
    if plan.sizes.num_experts:
        recipe["parallel"]["expert_placement"] = layout.placement
    if config.model.max_model_len is not None:
        recipe["model"]["max_model_len"] = config.model.max_model_len
    if config.model.allow_unverified:
        recipe["model"]["allow_unverified"] = True
    if cache := _cache(config.cache):
        recipe["cache"] = cache
    return recipe


def _cache(config: CacheConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"dtype": config.dtype} if config.dtype != "auto" else {}
    if config.offload_host_bytes:
        settings["offload_host_bytes"] = config.offload_host_bytes
    if config.offload_disk_bytes:
        settings["offload_disk_bytes"] = config.offload_disk_bytes
        settings["offload_disk_folder"] = config.offload_disk_folder
    return settings


def _policy(candidate: Candidate, plan: Plan) -> dict[str, Any]:
    if candidate.policy == "static":
        assert candidate.mode is not None
        return {"name": "static", "mode": list(candidate.mode)}
    if candidate.policy == "threshold":
        return {"name": "threshold", "threshold_tokens": candidate.threshold}
    targets = {f"target_{name}_ms": plan.targets[name] for name in ("ttft", "tpot") if name in plan.targets}
    return {"name": "adaptive", **targets}


def write_recipe(path: Path, recipe: dict[str, Any], comment: str) -> None:
    """Write it as YAML. Raises `ConfigError` if that is not possible."""
    text = f"# {comment}\n" + yaml.safe_dump(recipe, sort_keys=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the recipe '{path}' cannot be written: {first_line(error)}") from error
