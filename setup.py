"""Compiles the C kernels for several instruction sets while a wheel is built, so that its users need no compiler.

Everything else about the package is in pyproject.toml. Without a C compiler the wheel ships only the C files.
ULYSSES_INFER_BUILD_LEVELS (names of native/levels.py with commas between) compiles for fewer levels than all.
"""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("ulysses_infer", "native")


def load(name: str) -> ModuleType:
    """A module of native/ by its path: the package itself needs torch, which is not there during a build."""
    spec = importlib.util.spec_from_file_location(name, NATIVE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_kernels(folder: Path) -> None:
    """Compile every C file for every level of this kind of machine into folder/<level>/<name>.so."""
    compiler, levels = load("compiler"), load("levels")
    try:
        found = compiler.find_compiler()
    except compiler.NativeUnavailableError as error:
        print(f"warning: the wheel has no compiled kernels: {error}")
        return
    wanted = os.environ.get("ULYSSES_INFER_BUILD_LEVELS", "").split(",")

    def build(source: Path, level: Any) -> None:
        try:
            compiler.compile_library(found, source, folder / level.name / f"{source.stem}.so", level.flags)
        except compiler.NativeUnavailableError as error:  # a compiler that does not know the level yet
            print(f"warning: {source.name} is not compiled for {level.name}: {error}")

    chosen = [level for level in levels.levels_of_machine() if wanted == [""] or level.name in wanted]
    for level in chosen:
        (folder / level.name).mkdir(parents=True, exist_ok=True)
    pairs = [(source, level) for level in chosen for source in compiler.sources()]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(build, *zip(*pairs, strict=True)):  # raises what a build raises
            pass


class BuildWithKernels(build_py):
    """Adds the compiled kernels, except to an editable installation, which compiles them when they are used."""

    def run(self) -> None:
        """Copy the package and compile."""
        super().run()
        if not self.editable_mode:
            compile_kernels(Path(self.build_lib) / NATIVE / "built")


class WheelOfPlatform(bdist_wheel):
    """A wheel for one kind of machine and any Python 3: the libraries do not use Python's interface."""

    def finalize_options(self) -> None:
        """The wheel has compiled code."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """For example py3-none-linux_x86_64."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfPlatform})
