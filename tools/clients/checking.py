"""Runs a client's checks against a server, and writes one line of JSON per check. Standard library only."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

CUT = 300  # most characters of an error
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Settings with which the clients look for nothing outside this machine."""


@dataclass(frozen=True)
class Server:
    """What a client has to know."""

    url: str
    """Without /v1."""
    model: str
    """The model's name on the server."""
    tokenizer: str
    """A folder with the model's tokenizer."""


Check = Callable[[Server], None]
"""Returns if the server did as the client expects; otherwise raises whatever the client raises."""


class Results:
    """The file to which results are written as they come."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, check: str, error: str | None = None) -> None:
        """error: what was wrong, None if nothing was."""
        self._file.write(json.dumps({"check": check, "error": error}) + "\n")
        self._file.flush()


Program = Callable[[Server, Results], None]


def main(program: Program) -> None:
    """Run a client's program with the arguments of its command line: URL, model, tokenizer, file for the results."""
    url, model, tokenizer, path = sys.argv[1:5]
    os.environ.update(OFFLINE)
    with open(path, "a", encoding="utf-8") as file:
        program(Server(url, model, tokenizer), Results(file))


def run_all(checks: Sequence[Check]) -> Program:
    """The program that runs each check; a check's name is that of its function."""

    def program(server: Server, results: Results) -> None:
        for check in checks:
            results.write(check.__name__.replace("_", " "), error_of(check, server))

    return program


def error_of(check: Check, server: Server) -> str | None:
    """What a check raises, in one line; None if it passes."""
    try:
        check(server)
    except Exception as error:  # whatever the client raises is the result of the check
        traceback.print_exc()
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """The error, and where an assertion failed."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.line} ({Path(frame.filename).name}:{frame.lineno}){': ' * bool(text)}{text}"
    return f"{type(error).__name__}: {text}"[:CUT]


def equal(found: Any, wanted: Any) -> None:
    """Raises `AssertionError` that shows both unless they are equal."""
    if found != wanted:
        raise AssertionError(f"{found!r} instead of {wanted!r}")


def joined(parts: Iterable[str | None]) -> str:
    """The text of a stream."""
    return "".join(part or "" for part in parts)


def json_lines(text: str) -> list[Any]:
    """The lines of a text that are JSON."""
    values = []
    for line in text.splitlines():
        with suppress(ValueError):
            values.append(json.loads(line))
    return values
