"""The order of folders: imports point down only, without circles, and no folder has too many files."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ulysses_infer"
LAYERS = [
    {"launch", "cli"},
    {"llm", "rl"},
    {"planning"},
    {"ray"},
    {"server", "bench"},
    {"console"},
    {"inference"},
    {"job"},
    {"engine"},
    {"text"},
    {"worker"},
    {"model"},
    {"cache"},
    {"attention"},
    {"config"},
    {"step_time"},
    {"parallel"},
    {"native", "kernels"},
    {"sampling_params"},
    {"structured_outputs"},
    {"request_values"},
    {"outputs"},
    {"extras"},
    {"errors", "host", "arithmetic", "atomic_files", "cache_folders", "child_processes", "version"},
]
"""From the top down. A module may import from its own folder and from lower layers."""
INDEPENDENT = [("launch", "cli"), ("kernels", "native"), ("server", "bench"), ("bench", "server")]
"""Pairs within a layer: the first may import the second."""
MAX_FILES = 20


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports anywhere: at the top, lazily, or for type checking only."""
    targets = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                targets.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
    return targets


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) for name, path in known.items()}


def folder_of(module: str) -> str:
    return module.split(".")[1]


def layer_of(module: str) -> int:
    folder = folder_of(module)
    return next(number for number, layer in enumerate(LAYERS) if folder in layer)


def test_every_folder_has_a_layer(graph):
    assert {folder_of(name) for name in graph if name != PACKAGE} == set().union(*LAYERS)


def test_imports_point_down_only(graph):
    upward = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if PACKAGE not in (name, target)
        and layer_of(target) <= layer_of(name)
        and folder_of(target) != folder_of(name)
        and (folder_of(name), folder_of(target)) not in INDEPENDENT
    ]
    assert not upward, "\n".join(upward)


def test_no_module_imports_the_package_itself(graph):
    """The package imports its modules when a public name is first used: importing it from one would be a circle."""
    assert not [name for name, targets in graph.items() if PACKAGE in targets]


def test_there_are_no_import_circles(graph):
    remaining = {name: targets & graph.keys() - {name} for name, targets in graph.items() if name != PACKAGE}
    while leaves := {name for name, targets in remaining.items() if not targets & remaining.keys()}:
        remaining = {name: targets for name, targets in remaining.items() if name not in leaves}
    assert not remaining, f"these modules import each other: {sorted(remaining)}"


def test_no_folder_has_too_many_files():
    counts: dict[Path, int] = defaultdict(int)
    for path in (ROOT / PACKAGE).rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.name != "__init__.py":
            counts[path.parent] += 1
    assert {str(folder): count for folder, count in counts.items() if count > MAX_FILES} == {}


def test_every_test_file_has_its_own_name() -> None:
    """pytest imports them by name alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
