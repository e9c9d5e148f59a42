"""The GPUs that a dry run can assume."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch

from ulysses_infer.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability and memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


# Memory: `memory.total` of nvidia-smi in MiB, which is less than the nominal size. Compute capability: NVIDIA's table
# of CUDA GPUs.
TABLE = {
    "b200": ("B200", (10, 0), 183359),
    "h200": ("H200", (9, 0), 143771),
    "h100": ("H100 80 GB", (9, 0), 81559),
    "h100-pcie": ("H100 PCIe", (9, 0), 81559),
    "h100-nvl": ("H100 NVL", (9, 0), 95830),
    "gh200": ("GH200 96 GB", (9, 0), 97871),
    "h20": ("H20", (9, 0), 97871),
    "a100": ("A100 80 GB", (8, 0), 81920),
    "a100-40gb": ("A100 40 GB", (8, 0), 40960),
    "a40": ("A40", (8, 6), 46068),
    "a10": ("A10", (8, 6), 23028),
    "a6000": ("RTX A6000", (8, 6), 49140),
    "l4": ("L4", (8, 9), 23034),
    "l40s": ("L40S", (8, 9), 46068),
    "rtx3090": ("GeForce RTX 3090", (8, 6), 24576),
    "rtx4090": ("GeForce RTX 4090", (8, 9), 24564),
    "rtx5090": ("GeForce RTX 5090", (12, 0), 32607),
}
"""By the name that `--gpu` takes: name, compute capability, MiB of memory."""


def find_gpu(name: str) -> Gpu:
    """The GPU that `--gpu` names. Raises `ConfigError` with the nearest name."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in TABLE:
        near = difflib.get_close_matches(key, TABLE, n=1, cutoff=0.0)[0]
        raise ConfigError(f"--gpu {name}: unknown; the nearest is {near} (known: {', '.join(TABLE)})")
    shown, capability, mebibytes = TABLE[key]
    return Gpu(shown, capability, mebibytes * MIB)


def own_gpu() -> Gpu:
    """The first GPU of this machine. Raises `ConfigError` if it has none."""
    if not torch.cuda.is_available():
        raise ConfigError("a dry run without a GPU needs to know which one to assume; give --gpu, as in --gpu h200")
    found = torch.cuda.get_device_properties(0)
    return Gpu(found.name, (found.major, found.minor), found.total_memory)
