"""The conditions under which a profile is valid, and estimates for when there is none."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from ulysses_infer.host import ranks_on_this_host
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import Measurement
from ulysses_infer.step_time.prior import CPU, GPU, Machine, Sizes, assumed_steps
from ulysses_infer.version import __version__
from ulysses_infer.worker.worker import Worker


def profile_key(worker: Worker, modes: Sequence[Mode]) -> dict[str, Any]:
    """The conditions under which step times hold, as plain values."""
    model = worker.model
    return {
        "model": {
            "type": model.injection.config.model_type,
            **json.loads(json.dumps(asdict(model.shape))),  # as read back: lists, not tuples
            "weight_bytes": model.weight_bytes,
            "dtype": str(model.dtype).removeprefix("torch."),
            **({"hf_overrides": dict(model.hf_overrides)} if model.hf_overrides else {}),
        },
        "modes": [list(mode) for mode in modes],
        "device": device_name(worker.device),
        "hosts": worker.groups.layout.world_size // ranks_on_this_host(worker.groups.layout.world_size),
        "rank_order": worker.groups.layout.rank_order,
        "threads": torch.get_num_threads(),
        "attention": worker.backend.name,
        "matmul": "torch" if worker.matmul is None else worker.matmul.name,
        "collectives": "torch" if worker.groups.memory is None else "shared_memory",
        "fused": model.decoder is not None,
        "captured": worker.graphs is not None,
        "cache": {
            "dtype": str(worker.cache.shape.dtype).removeprefix("torch."),
            "block_size": worker.cache.shape.block_size,
        },
        "versions": {
            "ulysses_infer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's name and the number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def assumed(worker: Worker, modes: Sequence[Mode]) -> list[Measurement]:
    """Estimated step times, from the model's sizes and the nominal speed of this kind of device."""
    shape, layout = worker.model.shape, worker.groups.layout
    heads = shape.first_heads.on(layout) if shape.num_attention_heads else None
    sizes = Sizes(
        shape.num_layers,
        shape.hidden_size,
        heads.query_slots * layout.world_size if heads else 0,
        heads.key_value_slots * layout.world_size if heads else 0,
        shape.key_width,
        worker.model.weight_bytes // worker.model.dtype.itemsize * layout.base.tp,
        worker.model.dtype.itemsize,
        worker.model.skipped_share,
    )
    machine: Machine = GPU if worker.device.type == "cuda" else CPU
    return assumed_steps(sizes, machine, modes)
