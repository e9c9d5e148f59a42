"""Messages to and from worker processes: JSON over a local socket. Standard library only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

Task = dict[str, Any]
"""`prompts`: token ids of each; `output_len`: tokens to generate for each; and the contender's settings."""
Answer = dict[str, Any]
"""`first`: seconds to the first token; `seconds`: to the last one; `tokens`: the generated ids of each prompt."""
Measure = Callable[[Task], Answer]
CUT = 300  # most characters of an error message


class Stopwatch:
    """Seconds since its creation, and until the first token."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first = 0.0

    def token(self) -> None:
        """Note that a token has come."""
        self._first = self._first or time.perf_counter() - self._started

    def answer(self, tokens: list[list[int]]) -> Answer:
        """The answer, once all tokens have come."""
        return {"first": self._first, "seconds": time.perf_counter() - self._started, "tokens": tokens}


def receive(connection: Connection) -> Any:
    """The next message. Raises `EOFError` when the other side is gone."""
    return json.loads(connection.recv_bytes())


def send(connection: Connection, message: Any) -> None:
    """Send a message to the other side."""
    connection.send_bytes(json.dumps(message).encode())


def one_line(error: BaseException) -> str:
    """The error in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:CUT]}"


def serve(start: Callable[[dict[str, Any]], tuple[Measure, str]]) -> None:
    """Run a worker: `start(options)` returns a function that measures and a version; then one answer per task."""
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
