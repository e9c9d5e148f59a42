"""The contenders: the processes to run, and the rows of the result that each gives."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare_peers.environments import our_tool, prepare

WORKERS = "benchmarks.compare_peers.workers"
LIMITS = "limits"


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


@dataclass(frozen=True)
class Program:
    """A worker process: its command up to the socket's path, its options, and additional environment variables."""

    command: list[str]
    options: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """A row of the result: a program, and additional settings of its tasks."""

    label: str
    program: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it is this engine and not a peer."""
        return self.program.startswith("ours")


def _ours(policy: str, **settings: Any) -> dict[str, Any]:
    return {"policy": {"name": policy, **settings}}


CONTENDERS = {
    "ours-tp": Contender("ours, TP over the ranks", "ours", _ours("static", mode="tp")),
    "ours-sp": Contender("ours, SP over the ranks", "ours", _ours("static", mode="sp")),
    "ours-shift": Contender("ours, shift, threshold", "ours", _ours("threshold")),
    "ours-adaptive": Contender("ours, shift, adaptive", "ours", _ours("adaptive")),
    "ours-single": Contender("ours, 1 rank, all threads", "ours-single"),
    "vllm-tp": Contender("vLLM, TP", "vllm-tp"),
    "vllm": Contender("vLLM, 1 process", "vllm"),
    "deepspeed": Contender("DeepSpeed init_inference, TP", "deepspeed"),
    "transformers": Contender("transformers generate", "transformers"),
    "llama.cpp": Contender("llama.cpp", "llama.cpp"),
}
"""In the order of the table."""


def _module(python: Path | str, name: str) -> list[str]:
    return [str(python), "-m", f"{WORKERS}.{name}"]


def our_ranks(setting: Setting) -> Program:
    """This engine on as many ranks as there are threads."""
    return _our_program(setting, setting.threads, 1)


def our_single_rank(setting: Setting) -> Program:
    """This engine on one rank with all threads."""
    return _our_program(setting, 1, setting.threads)


def _our_program(setting: Setting, ranks: int, threads: int) -> Program:
    blocks = setting.max_num_seqs * -(-setting.max_model_len // 16) * 2  # enough for any block size
    options = {
        "model": str(setting.model),
        "dtype": setting.dtype,
        "sp": ranks,
        "threads": threads,
        "num_blocks": blocks,
        "overrides": setting.overrides,
    }
    variables = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    return Program(_module(sys.executable, "ours"), options, variables)


def transformers_generate(setting: Setting) -> Program:
    """transformers, in our own environment: it is a dependency of ours."""
    options = {"model": str(setting.model), "dtype": setting.dtype, "threads": setting.threads}
    variables = {"OMP_NUM_THREADS": str(setting.threads), "DS_ACCELERATOR": "cpu"}
    return Program(_module(sys.executable, "transformers_generate"), options, variables)


def deepspeed_init_inference(setting: Setting) -> Program:
    """DeepSpeed through its launcher, in our own environment; it compiles its shared-memory collectives once."""
    operators = setting.environments / "deepspeed-ops"
    for lock in operators.glob("*/lock"):  # left by a killed compilation; others would wait for it forever
        lock.unlink()
    options = {"model": str(setting.model), "dtype": setting.dtype, "tp": setting.threads, "threads": 1}
    ranks = ["--num_gpus", str(setting.threads), "--no_local_rank", "--master_port", str(_free_port())]
    command = [our_tool("deepspeed"), "-q", *ranks, "--module", f"{WORKERS}.deepspeed_init_inference"]
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(operators)}
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


def llama_cpp(setting: Setting) -> Program:
    """llama.cpp, its model file written beside its environment."""
    folder = setting.environments / "llama.cpp"
    python = prepare("llama.cpp", folder)
    options = {
        "model": str(setting.model),
        "dtype": setting.dtype,
        "threads": setting.threads,
        "folder": str(folder),
        "max_model_len": setting.max_model_len,
        "max_num_seqs": setting.max_num_seqs,
    }
    return Program(_module(python, "llama_cpp_batched"), options)


def machine_limits(setting: Setting) -> Program:
    """No engine: the limits of the processors."""
    variables = {"OMP_NUM_THREADS": str(setting.threads)}
    return Program(_module(sys.executable, "limits"), {"threads": setting.threads}, variables)


PROGRAMS: dict[str, Callable[[Setting], Program]] = {
    LIMITS: machine_limits,
    "ours": our_ranks,
    "ours-single": our_single_rank,
    "vllm-tp": vllm_tensor_parallel,
    "vllm": vllm,
    "deepspeed": deepspeed_init_inference,
    "transformers": transformers_generate,
    "llama.cpp": llama_cpp,
}
"""How to make each program; may take minutes the first time. They raise `UnavailableError`."""
