"""Shift Parallelism for Hugging Face language models: one model, one KV cache, the best mode for every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ulysses_infer.version import __version__

if TYPE_CHECKING:
    from ulysses_infer.inference import InferenceEngine, init_inference
    from ulysses_infer.llm import LLM
    from ulysses_infer.outputs import RequestOutput
    from ulysses_infer.planning.command import plan
    from ulysses_infer.sampling_params import SamplingParams

__all__ = ["LLM", "InferenceEngine", "RequestOutput", "SamplingParams", "__version__", "init_inference", "plan"]

_HOMES = {
    "InferenceEngine": "ulysses_infer.inference",
    "LLM": "ulysses_infer.llm",
    "RequestOutput": "ulysses_infer.outputs",
    "SamplingParams": "ulysses_infer.sampling_params",
    "init_inference": "ulysses_infer.inference",
    "plan": "ulysses_infer.planning.command",
}


def __getattr__(name: str) -> Any:
    """Load public names on first use (PEP 562): importing the package must not cost torch and transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
