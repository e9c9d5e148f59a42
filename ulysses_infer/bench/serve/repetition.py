"""Prompts whose answers repeat parts of them: edits of code, summaries and records, made of Python's own library."""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ulysses_infer.bench.serve.item import Item

MODULES = (
    *(
        "bisect",
        "calendar",
        "colorsys",
        "configparser",
        "copy",
        "csv",
        "dataclasses",
        "difflib",
        "fileinput",
        "fnmatch",
    ),
    *(
        "glob",
        "heapq",
        "linecache",
        "locale",
        "mimetypes",
        "posixpath",
        "random",
        "reprlib",
        "sched",
        "shlex",
        "shutil",
    ),
    *("statistics", "string", "tempfile", "textwrap", "timeit", "tokenize", "traceback", "types", "uuid", "zipapp"),
)
"""Of Python's library: enough text, and read in a moment."""
CHARACTERS_PER_TOKEN = 3.5
SHORTEST = 200  # characters of a function
FEWEST_USES = 3  # of the variable that an edit renames
NEW_NAMES = ("collected", "current_value", "total_count", "source_text", "position", "handler")
RECORD_KEYS = ("module_name", "number_of_lines", "number_of_functions", "number_of_classes", "has_documentation")
EXAMPLES = 2  # records that the prompt shows in both forms


class CodeEdit(NamedTuple):
    """A function of Python's library before and after one of its names is replaced."""

    before: str
    after: str
    old_name: str
    new_name: str


def code_edits(input_len: int, seed: int) -> Iterator[CodeEdit]:
    """An endless series of edits. input_len: about how many tokens the function has at most."""
    draw = random.Random(f"edits/{seed}")
    functions = [text for text in _functions() if len(text) <= max(2 * SHORTEST, input_len * CHARACTERS_PER_TOKEN)]
    while True:
        before, new_name = draw.choice(functions), draw.choice(NEW_NAMES)
        old_name = _most_used_name(before)
        yield CodeEdit(before, re.sub(rf"\b{old_name}\b", new_name, before), old_name, new_name)


def _code_edit_items(input_len: int, output_len: int | None, seed: int) -> Iterator[Item]:
    for edit in code_edits(input_len, seed):
        prompt = (
            f"A Python function:\n```python\n{edit.before}\n```\n\nThe same function with the variable "
            f"`{edit.old_name}` renamed to `{edit.new_name}`:\n```python\n"
        )
        yield Item(prompt, output_len or _num_tokens(edit.after))


def _summary_items(input_len: int, output_len: int | None, seed: int) -> Iterator[Item]:
    draw = random.Random(f"summaries/{seed}")
    most = round(max(2 * SHORTEST, input_len * CHARACTERS_PER_TOKEN))
    while True:
        text = draw.choice(_docstrings())[:most]
        prompt = f"Text:\n{text}\n\nThe most important sentences of this text, word for word:\n"
        yield Item(prompt, output_len or max(1, _num_tokens(text) // 3))


def _record_items(input_len: int, output_len: int | None, seed: int) -> Iterator[Item]:
    draw = random.Random(f"records/{seed}")
    count = max(EXAMPLES + 1, round(input_len * CHARACTERS_PER_TOKEN / 40))
    while True:
        rows = draw.choices(_records(), k=count)
        table = "\n".join(", ".join(map(str, row)) for row in rows)
        shown = "".join(f"{_as_json(row)}\n" for row in rows[:EXAMPLES])
        prompt = f"{', '.join(RECORD_KEYS)}\n{table}\n\nEvery line above as JSON:\n{shown}"
        yield Item(prompt, output_len or sum(_num_tokens(_as_json(row)) for row in rows[EXAMPLES:]))


REPETITIVE: dict[str, Callable[[int, int | None, int], Iterator[Item]]] = {
    "code_edit": _code_edit_items,
    "summary": _summary_items,
    "json_records": _record_items,
}
"""Endless series of prompts as text, by name, of (about how many tokens a prompt has, output length or None for that of
the expected answer, seed). Every machine with the same Python has the same prompts."""


@lru_cache(maxsize=1)
def _library() -> list[tuple[str, str, ast.Module]]:
    """(name, source, syntax tree) of each module."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [(name, (folder / f"{name}.py").read_text(encoding="utf-8")) for name in MODULES]
    return [(name, source, ast.parse(source)) for name, source in sources]


@lru_cache(maxsize=1)
def _functions() -> list[str]:
    """Sources of functions that are long enough and use a variable often."""
    nodes = [
        (node, source) for _, source, tree in _library() for node in tree.body if isinstance(node, ast.FunctionDef)
    ]
    often_used = [(node, source) for node, source in nodes if max(_names(node).values(), default=0) >= FEWEST_USES]
    texts = [ast.get_source_segment(source, node) or "" for node, source in often_used]
    return [text for text in texts if len(text) >= SHORTEST]


@lru_cache(maxsize=1)
def _docstrings() -> list[str]:
    texts = [ast.get_docstring(tree) or "" for _, _, tree in _library()]
    return [text for text in texts if len(text) >= 2 * SHORTEST]


@lru_cache(maxsize=1)
def _records() -> list[tuple[str, int, int, int, str]]:
    return [_record(*module) for module in _library()]


def _record(name: str, source: str, tree: ast.Module) -> tuple[str, int, int, int, str]:
    kinds = Counter(type(node).__name__ for node in tree.body)
    documented = "yes" if ast.get_docstring(tree) else "no"
    return name, source.count("\n"), kinds["FunctionDef"], kinds["ClassDef"], documented


def _as_json(row: tuple[str, int, int, int, str]) -> str:
    return json.dumps(dict(zip(RECORD_KEYS, row, strict=True)))


def _names(function: ast.AST) -> Counter[str]:
    """How often each variable is used."""
    return Counter(node.id for node in ast.walk(function) if isinstance(node, ast.Name) and len(node.id) > 1)


def _most_used_name(function: str) -> str:
    return _names(ast.parse(function)).most_common(1)[0][0]


def _num_tokens(text: str) -> int:
    """About how many tokens `text` has."""
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))
