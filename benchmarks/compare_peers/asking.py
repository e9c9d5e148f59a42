"""How a worker process is asked for measurements: JSON over a local socket. Standard library only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

Task = dict[str, Any]
"""`prompts`: token ids of each; `output_len`: tokens to generate for each; and what the contender's settings add."""
Answer = dict[str, Any]
"""`first`: seconds to the first token; `seconds`: to the last one; `tokens`: the generated ids of each prompt."""
Measure = Callable[[Task], Answer]
CUT = 300  # characters of an error that are worth a line


class Stopwatch:
    """Seconds since it was made, and those at which the first token came."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first = 0.0

    def token(self) -> None:
        """A token is there."""
        self._first = self._first or time.perf_counter() - self._started

    def answer(self, tokens: list[list[int]]) -> Answer:
        """Everything is there."""
        return {"first": self._first, "seconds": time.perf_counter() - self._started, "tokens": tokens}


def receive(connection: Connection) -> Any:
    """The next message. Raises `EOFError` when the other side is gone."""
    return json.loads(connection.recv_bytes())


def send(connection: Connection, message: Any) -> None:
    """Give the other side a message."""
    connection.send_bytes(json.dumps(message).encode())


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:CUT]}"


def serve(start: Callable[[dict[str, Any]], tuple[Measure, str]]) -> None:
    """A worker's whole life: `start(options)` gives how to measure and a version; then one answer for each task."""
    connection = Client(sys.argv[1], "AF_UNIX")
    try:
        measure, version = start(receive(connection))
        send(connection, {"version": version})
        while True:
            send(connection, measure(receive(connection)))
    except EOFError:
        return
    except BaseException as error:
        send(connection, {"error": one_line(error)})
        raise
