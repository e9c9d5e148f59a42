"""Rank 0's end of the socket to the HTTP process; it never blocks a step."""

from __future__ import annotations

import os
import select
import socket
import threading
import time

from ulysses_infer.server.frames import FrameReader, encode_frame
from ulysses_infer.server.messages import FromCoordinator, FromEngine, ToEngine

READ_BYTES = 1 << 18
BUFFER_BYTES = 4 << 20  # what the system may buffer while the HTTP process is busy


class Link:
    """Messages over a connected socket. `send` and `wake` are thread-safe; `receive` is for one thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._connection = connection
        self._frames: FrameReader[ToEngine] = FrameReader(ToEngine)
        self._unsent = bytearray()
        self._lock = threading.Lock()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        self.is_closed = False
        """Whether the HTTP process has gone."""

    def send(self, message: FromEngine | FromCoordinator) -> None:
        """Send a message. What the system cannot buffer goes with the next message or `receive`."""
        frame = encode_frame(message)
        with self._lock:
            self._unsent += frame
            self._flush()

    def send_last(self, message: FromEngine | FromCoordinator, seconds: float) -> None:
        """Send a message before this process ends, and wait until it is sent, at most this long."""
        self.send(message)
        self.flush(seconds)

    def flush(self, seconds: float) -> None:
        """Wait until everything is sent, at most this long."""
        deadline = time.monotonic() + seconds
        while self._unsent and not self.is_closed and time.monotonic() < deadline:
            select.select([], [self._connection], [], 0.05)
            with self._lock:
                self._flush()

    def receive(self, timeout: float) -> list[ToEngine]:
        """The messages that arrived, waiting up to `timeout` seconds for the first one or for `wake`."""
        if self.is_closed:
            return []
        connection, woken = self._connection.fileno(), self._woken
        ready, writable, _ = select.select([connection, woken], [connection] if self._unsent else [], [], timeout)
        if writable:
            with self._lock:
                self._flush()
        if woken in ready:
            os.read(woken, 64)
        return list(self._frames.feed(self._read())) if connection in ready else []

    def wake(self) -> None:
        """Wake a waiting `receive`."""
        os.write(self._waker, b"w")

    def close(self) -> None:
        """Close this end; the HTTP process notices."""
        self.is_closed = True
        self._connection.close()

    def _read(self) -> bytes:
        try:
            data = self._connection.recv(READ_BYTES)
        except BlockingIOError:
            return b""
        except ConnectionError:
            data = b""
        self.is_closed = self.is_closed or not data
        return data

    def _flush(self) -> None:
        try:
            sent = self._connection.send(self._unsent) if self._unsent else 0
        except BlockingIOError:
            return
        except OSError:  # the HTTP process has gone
            self.is_closed, sent = True, len(self._unsent)
        del self._unsent[:sent]
