"""Signatures in the source of an installed library, which is not imported: that would need packages it pins."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any


def methods(module: str, name: str) -> dict[str, list[str]]:
    """The methods of a class, and the names of their parameters."""
    body = _found(module, name, ast.ClassDef).body
    functions = (node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name: _parameters(node) for node in functions}


def parameters_of_function(module: str, name: str) -> list[str]:
    """The names of a function's parameters."""
    return _parameters(_found(module, name, ast.FunctionDef))


def _found(module: str, name: str, kind: type[Any]) -> Any:
    root, *rest = module.split(".")
    spec = importlib.util.find_spec(root)
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest).with_suffix(".py")
    (found,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, kind) and node.name == name)
    return found


def _parameters(node: Any) -> list[str]:
    return [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
