"""The processes to run: how each engine is started, in its own environment and held to the same instructions."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.compare_peers.environments import UnavailableError, our_tool, prepare

WORKERS = "benchmarks.compare_peers.workers"
LIMITS = "limits"
LEVELS: dict[str, Mapping[str, str]] = {
    "native": {},
    "x86-64-v3": {
        "ULYSSES_INFER_NATIVE_LEVEL": "x86-64-v3",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
"""The instructions that all engines may use, with the variables that hold ours, torch, oneDNN and MKL to them."""


@dataclass(frozen=True)
class Setting:
    """The settings that all engines are started with."""

    model: Path
    dtype: str
    threads: int
    """Of all processes of an engine together."""
    max_model_len: int
    max_num_seqs: int
    environments: Path
    """Folder of the peers' virtual environments and of what they compile."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of our own configuration."""
    level: str = "native"
    """Of `LEVELS`."""


@dataclass(frozen=True)
class Program:
    """A worker process: its command up to the socket's path, its options, and additional environment variables."""

    command: list[str]
    options: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)


def _module(python: Path | str, name: str) -> list[str]:
    return [str(python), "-m", f"{WORKERS}.{name}"]


def our_ranks(setting: Setting, quantize: str | None = None) -> Program:
    """This engine on as many ranks as there are threads; `quantize`: as `model.quantize`."""
    return _our_program(setting, setting.threads, 1, quantize)


def our_single_rank(setting: Setting, quantize: str | None = None) -> Program:
    """This engine on one rank with all threads; `quantize`: as `model.quantize`."""
    return _our_program(setting, 1, setting.threads, quantize)


def _our_program(setting: Setting, ranks: int, threads: int, quantize: str | None) -> Program:
    blocks = setting.max_num_seqs * -(-setting.max_model_len // 16) * 2  # enough for any block size
    options = {
        "model": str(setting.model),
        "dtype": setting.dtype,
        "sp": ranks,
        "threads": threads,
        "max_model_len": setting.max_model_len,
        "num_blocks": blocks,
        "overrides": ({"model.quantize": quantize} if quantize else {}) | setting.overrides,
    }
    return Program(_module(sys.executable, "ours"), options, _torch_variables(setting, threads))


def _torch_variables(setting: Setting, threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", **LEVELS[setting.level]}


def transformers_generate(setting: Setting) -> Program:
    """transformers, in our own environment: it is a dependency of ours."""
    options = {"model": str(setting.model), "dtype": setting.dtype, "threads": setting.threads}
    return Program(
        _module(sys.executable, "transformers_generate"), options, _torch_variables(setting, setting.threads)
    )


def deepspeed_init_inference(setting: Setting) -> Program:
    """DeepSpeed through its launcher, in our own environment; it compiles its shared-memory collectives once."""
    operators = setting.environments / "deepspeed-ops"
    for lock in operators.glob("*/lock"):  # left by a killed compilation; others would wait for it forever
        lock.unlink()
    options = {"model": str(setting.model), "dtype": setting.dtype, "tp": setting.threads, "threads": 1}
    ranks = ["--num_gpus", str(setting.threads), "--no_local_rank", "--master_port", str(_free_port())]
    command = [our_tool("deepspeed"), "-q", *ranks, "--module", f"{WORKERS}.deepspeed_init_inference"]
    variables = _torch_variables(setting, 1) | {"TORCH_EXTENSIONS_DIR": str(operators)}
    return Program(command, options, variables)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def vllm(setting: Setting) -> Program:
    """vLLM in one process with all threads."""
    return _vllm(setting, 1, _cores(setting, ","))


def vllm_tensor_parallel(setting: Setting) -> Program:
    """vLLM with one process per thread."""
    return _vllm(setting, setting.threads, _cores(setting, "|"))


def _cores(setting: Setting, separator: str) -> str:
    return separator.join(map(str, sorted(os.sched_getaffinity(0))[: setting.threads]))


def _vllm(setting: Setting, tensor_parallel: int, cores: str) -> Program:
    if setting.level != "native":
        raise UnavailableError(f"its kernels cannot be held to {setting.level}")
    folder = setting.environments / "vllm"
    python = prepare("vllm", folder)
    options = {
        "model": str(setting.model),
        "dtype": setting.dtype,
        "tp": tensor_parallel,
        "max_model_len": setting.max_model_len,
        "max_num_seqs": setting.max_num_seqs,
    }
    preloaded = [*folder.glob("lib/libiomp5.so"), *_tcmalloc(folder)]
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "VLLM_CACHE_ROOT": str(setting.environments / "vllm-cache"),
    }
    return Program(_module(python, "vllm_offline"), options, variables)


def _tcmalloc(folder: Path) -> list[Path]:
    """The allocator that vLLM wants preloaded, from its environment's `lib` or else from the system; one or none."""
    places = (folder / "lib", *Path("/usr/lib").glob("*-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib"))
    return [path for place in places for path in sorted(place.glob("libtcmalloc_minimal.so*"))][:1]


def llama_cpp(setting: Setting, weights: str = "") -> Program:
    """llama.cpp, its model file written beside its environment; `weights`: as `llama_model_quantize` makes them."""
    name = "llama.cpp" if setting.level == "native" else f"llama.cpp-{setting.level}"
    return _ggml(setting, name, "llama_cpp", weights)


def ik_llama_cpp(setting: Setting, weights: str = "") -> Program:
    """The fork ik_llama.cpp. Its wheel is compiled for AVX2, whatever the level."""
    return _ggml(setting, "ik_llama.cpp", "ik_llama_cpp._ctypes_api", weights)


def _ggml(setting: Setting, environment: str, binding: str, weights: str) -> Program:
    if weights and setting.dtype != "bfloat16":
        raise UnavailableError(f"{weights} is no {setting.dtype}")
    folder = setting.environments / environment
    python = prepare(environment, folder)
    options = {
        "binding": binding,
        "model": str(setting.model),
        "dtype": setting.dtype,
        "weights": weights,
        "threads": setting.threads,
        "folder": str(folder),
        "max_model_len": setting.max_model_len,
        "max_num_seqs": setting.max_num_seqs,
    }
    return Program(_module(python, "llama_cpp_batched"), options)


def machine_limits(setting: Setting) -> Program:
    """No engine: the limits of the processors."""
    variables = _torch_variables(setting, setting.threads)
    return Program(_module(sys.executable, "limits"), {"threads": setting.threads}, variables)


PROGRAMS: dict[str, Callable[[Setting], Program]] = {
    LIMITS: machine_limits,
    "ours": our_ranks,
    "ours-single": our_single_rank,
    "ours-int8": partial(our_ranks, quantize="int8"),
    "ours-int8-single": partial(our_single_rank, quantize="int8"),
    "ours-int4": partial(our_ranks, quantize="int4"),
    "ours-int4-single": partial(our_single_rank, quantize="int4"),
    "vllm-tp": vllm_tensor_parallel,
    "vllm": vllm,
    "deepspeed": deepspeed_init_inference,
    "transformers": transformers_generate,
    "llama.cpp": llama_cpp,
    "llama.cpp-q8_0": partial(llama_cpp, weights="q8_0"),
    "llama.cpp-q4_k": partial(llama_cpp, weights="q4_k"),
    "llama.cpp-q4_0": partial(llama_cpp, weights="q4_0"),
    "ik_llama.cpp": ik_llama_cpp,
    "ik_llama.cpp-q8_0": partial(ik_llama_cpp, weights="q8_0"),
    "ik_llama.cpp-q4_k": partial(ik_llama_cpp, weights="q4_k"),
}
"""How to make each program; may take minutes the first time. They raise `UnavailableError`."""
