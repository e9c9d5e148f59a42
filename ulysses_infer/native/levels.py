"""Instruction sets for which the C files are compiled, and which of them this processor has.

Only the standard library is imported, because the build of a wheel loads this file too.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

CPU_INFO = Path("/proc/cpuinfo")


class Level(NamedTuple):
    """A set of instructions: its name, the compiler's flags, and the features that the processor must have.

    `needs`: names in /proc/cpuinfo's `flags` (x86) or `Features` (Arm).
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: frozenset[str]


def _level(name: str, machine: str, flags: str, needs: Iterable[str]) -> Level:
    return Level(name, machine, tuple(flags.split()), frozenset(needs))


_V2 = ["sse4_2", "ssse3", "popcnt", "cx16"]
_V3 = [*_V2, "avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"]
_V4 = [*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
_DOTS = ["asimd", "asimddp", "asimdhp"]
LEVELS = (
    _level(
        "x86-64-v4-bf16", "x86_64", "-march=x86-64-v4 -mavx512vnni -mavx512bf16", [*_V4, "avx512_vnni", "avx512_bf16"]
    ),
    _level("x86-64-v4-vnni", "x86_64", "-march=x86-64-v4 -mavx512vnni", [*_V4, "avx512_vnni"]),
    _level("x86-64-v4", "x86_64", "-march=x86-64-v4", _V4),
    _level("x86-64-v3-vnni", "x86_64", "-march=x86-64-v3 -mavxvnni", [*_V3, "avx_vnni"]),
    _level("x86-64-v3", "x86_64", "-march=x86-64-v3", _V3),
    _level("x86-64-v2", "x86_64", "-march=x86-64-v2", _V2),
    _level("armv8.6-a", "aarch64", "-march=armv8.6-a", [*_DOTS, "bf16", "i8mm"]),
    _level("armv8.2-a", "aarch64", "-march=armv8.2-a+fp16+dotprod", _DOTS),
    _level("armv8-a", "aarch64", "-march=armv8-a", ["asimd"]),
)
"""The best level of each kind of machine first."""


def levels_of_machine() -> list[Level]:
    """The levels of this kind of machine, best first, whether the processor has them or not."""
    return [level for level in LEVELS if level.machine == platform.machine()]


def levels_here() -> list[Level]:
    """The levels that this processor has, best first."""
    features = _features()
    return [level for level in levels_of_machine() if level.needs <= features]


def describe_processor() -> str:
    """The kind of processor, on which code compiled for it and measured choices depend."""
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "\n".join(dict.fromkeys(line for line in _cpu_info() if line.startswith(wanted)))


def _cpu_info() -> list[str]:
    return CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []


def _features() -> set[str]:
    lines = [line for line in _cpu_info() if line.startswith(("flags", "Features"))]
    return set(lines[0].partition(":")[2].split()) if lines else set()
