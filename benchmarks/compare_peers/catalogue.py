"""The contenders: the rows of the result, in groups by the bits of their weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A row of the result: a program, and additional settings of its tasks."""

    label: str
    program: str
    settings: dict[str, Any] = field(default_factory=dict)
    bits: int = 16
    """Of a weight, nominally. Only contenders of equal bits are compared."""

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
    "ik_llama.cpp": Contender("ik_llama.cpp", "ik_llama.cpp"),
    "ours-int8": Contender("ours, int8, TP over the ranks", "ours-int8", _ours("static", mode="tp"), 8),
    "ours-int8-single": Contender("ours, int8, 1 rank, all threads", "ours-int8-single", bits=8),
    "llama.cpp-q8_0": Contender("llama.cpp, Q8_0", "llama.cpp-q8_0", bits=8),
    "ik_llama.cpp-q8_0": Contender("ik_llama.cpp, Q8_0", "ik_llama.cpp-q8_0", bits=8),
    "ours-int4": Contender("ours, int4, TP over the ranks", "ours-int4", _ours("static", mode="tp"), 4),
    "ours-int4-single": Contender("ours, int4, 1 rank, all threads", "ours-int4-single", bits=4),
    "llama.cpp-q4_k": Contender("llama.cpp, Q4_K", "llama.cpp-q4_k", bits=4),
    "llama.cpp-q4_0": Contender("llama.cpp, Q4_0", "llama.cpp-q4_0", bits=4),
    "ik_llama.cpp-q4_k": Contender("ik_llama.cpp, Q4_K", "ik_llama.cpp-q4_k", bits=4),
}
"""In the order of the table."""

YARDSTICKS = {16: "llama.cpp", 8: "llama.cpp-q8_0", 4: "llama.cpp-q4_k"}
"""By bits: the peer with which every contender is compared."""

QUICK_PEERS = (
    *("ours-tp", "ours-single", "transformers", "llama.cpp", "ik_llama.cpp"),
    *("ours-int8", "llama.cpp-q8_0", "ik_llama.cpp-q8_0", "ours-int4", "llama.cpp-q4_k", "ik_llama.cpp-q4_k"),
)
DEFAULT_PEERS = (*QUICK_PEERS, "ours-shift", "vllm")
"""Without those that rarely win a column and take minutes to start."""
