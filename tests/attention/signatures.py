"""Signatures of the libraries that attention calls: read from their source, and kept in signatures.json.

`python -m tests.attention.signatures` downloads the pinned releases and writes the file anew.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ulysses_infer.cache_folders import cache_folder

KEPT = Path(__file__).with_name("signatures.json")
DECODE, PREFILL = "BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"
LATENT = "BatchMLAPagedAttentionWrapper"
# By release: the file of each function. The plan of decodes passes all arguments on to `_plan_impl`.
RELEASES = {
    "flash-attn==2.8.3": {"flash_attn_varlen_func": "flash_attn/flash_attn_interface.py"},
    "flashinfer-python==0.7.4": {
        **{f"{DECODE}.{name}": "flashinfer/decode.py" for name in ("__init__", "_plan_impl", "run")},
        **{f"{PREFILL}.{name}": "flashinfer/prefill.py" for name in ("__init__", "plan", "run")},
        **{f"{LATENT}.{name}": "flashinfer/mla/_batch_mla/_wrapper.py" for name in ("__init__", "plan", "run")},
    },
}
KINDS = {
    "positional": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "rest": inspect.Parameter.VAR_POSITIONAL,
    "keyword": inspect.Parameter.KEYWORD_ONLY,
    "keywords": inspect.Parameter.VAR_KEYWORD,
}
Parameters = list[tuple[str, str, bool]]
"""Name, kind, and whether an argument must be given."""


class UnavailableError(Exception):
    """A release cannot be downloaded here."""


def kept() -> dict[str, dict[str, Parameters]]:
    """The signatures of signatures.json: by release and function."""
    found: dict[str, dict[str, Parameters]] = json.loads(KEPT.read_text())
    return found


def signature(function: str) -> inspect.Signature:
    """The signature of a function, without `self`."""
    (parameters,) = (found[function] for found in kept().values() if function in found)
    optional = {True: inspect.Parameter.empty, False: None}
    return inspect.Signature(
        [inspect.Parameter(name, KINDS[kind], default=optional[required]) for name, kind, required in parameters]
    )


def download(release: str) -> Path:
    """The wheel or source archive of a release, from a cache. Raises `UnavailableError`."""
    folder = cache_folder("releases") / release
    if not (found := _archives(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
        done = subprocess.run(
            [*command, "--dest", str(folder), release],
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
            check=False,
        )
        found = _archives(folder)
        if done.returncode or not found:
            raise UnavailableError(f"{release} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return found[0]


def _archives(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])


def read(archive: Path, functions: dict[str, str]) -> dict[str, Parameters]:
    """The signatures of `functions`, each in the file named, from the source in `archive`."""
    trees = {path: ast.parse(_source(archive, path)) for path in set(functions.values())}
    return {function: _parameters(_find(trees[path], function)) for function, path in functions.items()}


def _source(archive: Path, path: str) -> str:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path).decode()
    with tarfile.open(archive) as source:
        (member,) = (each for each in source.getmembers() if each.name.partition("/")[2] == path)
        file = source.extractfile(member)
        assert file is not None
        return file.read().decode()


def _find(tree: ast.Module, function: str) -> ast.FunctionDef:
    """The definition; of overloaded functions the last, which is the one that runs."""
    body: list[ast.stmt] = tree.body
    *classes, name = function.split(".")
    for each in classes:
        (found,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == each)
        body = found.body
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name][-1]


def _parameters(function: ast.FunctionDef) -> Parameters:
    return [each for each in _all_parameters(function.args) if each[0] != "self"]


def _all_parameters(given: ast.arguments) -> Iterator[tuple[str, str, bool]]:
    positional = [*given.posonlyargs, *given.args]
    first_optional = len(positional) - len(given.defaults)
    for place, each in enumerate(positional):
        yield each.arg, "positional", place < first_optional
    if given.vararg is not None:
        yield given.vararg.arg, "rest", True
    for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield each.arg, "keyword", default is None
    if given.kwarg is not None:
        yield given.kwarg.arg, "keywords", True


def as_text(found: dict[str, dict[str, Parameters]]) -> str:
    """The text of signatures.json, one function a line."""
    releases = []
    for release, functions in found.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(functions[name])}" for name in functions]
        releases.append(f"  {json.dumps(release)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(releases) + "\n}\n"


def main() -> None:
    """Write signatures.json."""
    found: dict[str, Any] = {release: read(download(release), names) for release, names in RELEASES.items()}
    KEPT.write_text(as_text(found))


if __name__ == "__main__":
    main()
